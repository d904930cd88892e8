"""What the user asked for: rules, times, thresholds, and the flags that say them. Standard library only."""
