"""The command line: options and printing. May import everything."""
