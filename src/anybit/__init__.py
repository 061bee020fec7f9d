"""anybit: low-bit, mixed-precision networks by three roads with the same terms and one result type.

    import anybit
    result = anybit.calibrate(model, inputs, budget="4bit")
    result.save("runs/mine")
    model = anybit.load("runs/mine", model=float_model)

Names are imported on first use, so that `import anybit` costs nothing.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "calibrate": "anybit.roads.calibrate",
    "allocate": "anybit.roads.allocate",
    "grow": "anybit.roads.grow",
    "train": "anybit.roads.train",
    "search": "anybit.roads.search",
    "extract": "anybit.roads.extract",
    "load_supernet": "anybit.supernets.folder",
    "evaluate": "anybit.roads.evaluate",
    "report": "anybit.reports.page",
    "export": "anybit.exports.verbs",
    "verify": "anybit.exports.verbs",
    "bench": "anybit.exports.verbs",
    "profile": "anybit.exports.verbs",
    "inspect": "anybit.roads.inspect",
    "load": "anybit.runs.opened",
    "diff": "anybit.reports.comparison",
    "explain": "anybit.reports.explanation",
    "show_progress": "anybit.reports.bars",
    "Result": "anybit.roads.result",
    "Matmul": "anybit.networks.matmul",
    "Precision": "anybit.scheme",
    "Scheme": "anybit.scheme",
    "Budget": "anybit.budget",
    "Samples": "anybit.data.samples",
    "Preprocessing": "anybit.sources.preprocessing",
    "AnybitError": "anybit.errors",
    "InvalidSetting": "anybit.errors",
    "InvalidInput": "anybit.errors",
    "InvalidFile": "anybit.errors",
    "UnsupportedModel": "anybit.errors",
    "SchemeMismatch": "anybit.errors",
    "InfeasibleBudget": "anybit.errors",
    "MissingPackage": "anybit.errors",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'anybit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
