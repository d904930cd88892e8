"""What the machine at hand can do, measured with torch alone: the figures that the cost model takes."""
