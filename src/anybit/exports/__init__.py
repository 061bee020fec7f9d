"""From a run folder to a file that runs. Imports roads and below."""
