import platform
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "ldm/__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)

# what a run needs of the folders beside the package: `ldm.places` finds it in the installed one
MODEL_FILES = (
    "model.ckpt",
    "judge.pt",
    "lcm.safetensors",
    "taesd.safetensors",
    "control.safetensors",
    "vocab.json",
    "merges.txt",
    "words.txt",
    "README.md",
)
ASSETS = {
    "ldm.assets.configs": ("configs", ["*/*.yaml"]),
    "ldm.assets.models": ("models", [f"ldm/shapes/{name}" for name in MODEL_FILES]),
}


class BuildLibrary(build_ext):
    """Compiles a library that is not a Python module: `ldm.runtime.native` loads it by the name of its file."""

    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + ".so"


# Optional: without a compiler, or with one that does not know the instructions, torch's operations do the same.
# OpenMP is compiled in but not linked, so that the threads are those of the OpenMP that torch brings.
NATIVE = Extension(
    "ldm.runtime.libnative",
    ["ldm/runtime/native.c"],
    libraries=["m"],
    extra_compile_args=["-O3", "-fopenmp", "-ffp-contract=off"],  # a product is rounded where it is written
    optional=True,
)
HAS_NATIVE = sys.platform == "linux" and platform.machine() == "x86_64"

setup(
    name="latent-diffusion-v1",
    version=VERSION,
    description="A toolkit for Stable Diffusion v1: images from text and images, offline, safe and reproducible",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The latent-diffusion-v1 authors",
    license="MIT",
    license_files=["LICENSE"],
    keywords=["stable diffusion", "latent diffusion", "txt2img", "img2img", "inpainting", "LoRA"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Multimedia :: Graphics",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=[*find_packages(include=["ldm", "ldm.*"]), *ASSETS],
    package_dir={package: folder for package, (folder, _) in ASSETS.items()},
    ext_modules=[NATIVE] if HAS_NATIVE else [],
    cmdclass={"build_ext": BuildLibrary},
    package_data={"ldm": ["py.typed"], **{package: files for package, (_, files) in ASSETS.items()}},
    entry_points={"console_scripts": ["ldm = ldm.cli.commands:main"]},
    install_requires=[
        "torch>=2.10,<2.14",
        "numpy>=1.26,<3",
        "omegaconf>=2.3,<2.5",
        "pyyaml>=6,<7",  # prompt lists
        "einops>=0.7,<0.9",
        "pillow>=12.2,<14",
        "tqdm>=4.66,<5",
        # the tokenizer: OpenAI's vocabulary, its text clean-up, the byte-pair merges
        "openai-clip>=1.0,<2",
        "ftfy>=6.1,<7",
        "regex>=2023.0",
        "tokenizers>=0.21,<0.24",
        # the tokenizer under the calls of the original's
        "transformers>=5.3,<5.24",
        # several devices, and training
        "pytorch-lightning>=2.5,<2.7",
        "torchmetrics>=1.4,<1.10",  # measures of evaluations; training needs it too
        # the watermark of the original
        "invisible-watermark>=0.2,<0.3",
        # the blur of masks
        "kornia>=0.8,<0.10",
    ],
    extras_require={
        "evaluate": ["matplotlib>=3.8,<3.12"],  # the plots of evaluations
        # peers of the benchmark; of zentorch the release for one's torch, stable-diffusion-cpp-python is compiled
        "benchmark": [
            "diffusers>=0.36,<0.43",
            "safetensors>=0.5,<0.9",
            "openvino>=2026.4,<2027",
            "nncf>=3.4,<4",
        ],
        # upscalers of the ESRGAN family; of the torchvision that it needs the release and kind for one's torch
        "upscale": ["spandrel>=0.4,<0.5"],
        "train": [
            "tensorboard>=2.20,<2.22",  # --tensorboard
            "bitsandbytes>=0.50,<0.51",  # --optimizer adamw8bit
        ],
        # the package itself has what this once added
        "devices": [],
        "test": [
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "hypothesis>=6.100,<7",
            "diffusers>=0.36,<0.43",
            "peft>=0.18,<0.22",
            "webdataset>=1,<1.1",  # writes the shards that their reader here is tested with
            "tensorboard>=2.20,<2.22",
            "matplotlib>=3.8,<3.12",  # plots, and their types
            "safetensors>=0.5,<0.9",
            "gguf>=0.17,<0.20",  # writes the files that its reader here is tested with
            "sd-parsers>=0.5,<0.7",
            "DeepCache>=0.1.1,<0.2",
            "tomesd>=0.1.3,<0.2",
            "ruff>=0.15,<0.18",
            "pyright>=1.1.400,<1.2",
            "setuptools>=71,<90",  # a test builds the wheel
        ],
    },
)
