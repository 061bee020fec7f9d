"""One network for every bit-width: its subnets and its folder. Imports runs and below."""
