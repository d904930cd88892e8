"""The cost model behind ``laep simulate``: inputs, times, memory. Pure; no torch."""
