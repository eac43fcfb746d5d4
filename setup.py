"""Metadata and layout of l2t_fast; the build backend and tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

DIGITS = ["scikit-learn>=1.4"]
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
    package_data={"l2t_fast": ["py.typed"]},
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
        "digits": DIGITS,
        "dev": [
            *DIGITS,
            "hypothesis>=6.100",
            "mypy>=1.13",
            "pre-commit>=4.0",
            "pytest>=8.2",
            "pytest-benchmark>=5.0",
            "ruff>=0.8",
            "timm>=1.0",
        ],
    },
    entry_points={"console_scripts": ["l2t-fast = l2t_fast.cli:main"]},
)
