"""Names of the files in a run folder, in a supernet's, and in a training that was interrupted."""

SCHEME = "scheme.json"
MODEL = "model.safetensors"
REPORT = "report.json"
SEARCH = "search.json"
SUPERNET = "supernet.safetensors"
SUPERNET_JSON = "supernet.json"
CHECKPOINT = "checkpoint.safetensors"
DRAFT_OF_CHECKPOINT = f".{CHECKPOINT}.tmp"
RUN_FILES = {
    SCHEME,
    MODEL,
    REPORT,
    SEARCH,
    SUPERNET,
    SUPERNET_JSON,
    CHECKPOINT,
    DRAFT_OF_CHECKPOINT,
    "candidates.safetensors",
    "candidates.json",
    "report.html",
}
