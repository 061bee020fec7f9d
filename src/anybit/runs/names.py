"""Names of the files in a run folder, in a supernet's folder, and in that of an interrupted training."""

SCHEME = "scheme.json"
MODEL = "model.safetensors"
REPORT = "report.json"
SEARCH = "search.json"
SUPERNET = "supernet.safetensors"
SUPERNET_JSON = "supernet.json"
CHECKPOINT = "checkpoint.safetensors"
FINGERPRINT = "fingerprint.safetensors"
DRAFT_OF_CHECKPOINT = f".{CHECKPOINT}.tmp"
RUN_FILES = {
    SCHEME,
    MODEL,
    REPORT,
    SEARCH,
    SUPERNET,
    SUPERNET_JSON,
    CHECKPOINT,
    FINGERPRINT,
    DRAFT_OF_CHECKPOINT,
    "candidates.safetensors",
    "candidates.json",
    "report.html",
}
