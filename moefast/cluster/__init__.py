"""Past one process: parts of a job, runs of many files, and what joins them."""
