"""One figure of a report a file; matplotlib is imported where a figure is drawn."""
