"""The command line: options and printing. Imports everything."""
