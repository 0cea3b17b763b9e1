"""sparsecc beside other structural pruners, installed and run in the same process: ``make bench-peers``."""
