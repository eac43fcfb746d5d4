"""Metadata and layout of l2t_fast; the build backend and tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "digits": ["scikit-learn>=1.4"],
    "timm": ["timm>=1.0"],
    "lightning": ["lightning>=2.4"],
    "accelerate": ["accelerate>=1.0"],
    "tensorboard": ["tensorboard>=2.17"],
    "onnx": ["onnx>=1.17", "onnxscript>=0.3"],
    "ray": ["ray>=2.40"],
    "submitit": ["submitit>=1.5"],
}
# What the tests of exactness need; those of extras are skipped where these are missing.
TEST = [
    *EXTRAS["digits"],
    *EXTRAS["timm"],
    "hypothesis>=6.100",
    "pytest>=9.0",
    "pytest-benchmark>=5.0",
    "pytest-xdist>=3.6",
]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.27"]
KERNELS = ["l2t_fast.kernels", *(f"l2t_fast.kernels.{name}" for name in find_packages("kernels"))]

setup(
    name="l2t-fast",
    version="0.1.0",
    description="Fast exact engine for 'Learning What and Where to Transfer' (L2T-ww, ICML 2019)",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=[*find_packages(include=["l2t_fast*"]), *KERNELS],
    package_dir={"l2t_fast.kernels": "kernels"},
    package_data={"l2t_fast": ["py.typed"], "l2t_fast.reports": ["report.html"]},
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "triton>=3.6; platform_system == 'Linux'",
        "nvidia-ml-py>=12",
        "numpy>=1.26",
        "matplotlib>=3.8",
        "rich>=13.7",
        "safetensors>=0.4",
        "scipy>=1.11",
        "tyro>=0.9",
    ],
    extras_require={
        **EXTRAS,
        "docs": DOCS,
        "test": TEST,
        "dev": [
            *TEST,
            *(requirement for extra in EXTRAS.values() for requirement in extra),
            *DOCS,
            "mypy>=1.13",
            "playwright>=1.48",
            "pre-commit>=4.0",
            "ruff>=0.8",
        ],
    },
    entry_points={"console_scripts": ["l2t-fast = l2t_fast.cli:main"]},
)
