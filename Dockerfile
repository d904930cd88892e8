# syntax=docker/dockerfile:1
# megatron_laep on an NVIDIA PyTorch image, which brings torch, TransformerEngine and apex built for
# the GPU. Nothing of these is touched: Megatron-Core and this package are installed without their
# dependencies, and the small Python packages that are missing are installed under a constraint that
# pins what is there.
#
#     docker build -t megatron-laep .
#     docker run --gpus all --ipc=host --ulimit memlock=-1 --rm -it megatron-laep
#
# The default tag is the one that Megatron-Core 0.19 is tested on upstream.
ARG NVIDIA_PYTORCH_TAG=26.06-py3
FROM nvcr.io/nvidia/pytorch:${NVIDIA_PYTORCH_TAG} AS base

ARG MEGATRON_CORE_VERSION=0.19.2

# The image's own versions, pinned. They are read from the metadata, because its builds carry local
# versions (2.10.0a0+...) that no registry has. numpy is among them: torch is compiled against it.
RUN python - >/tmp/pinned.txt <<'PYTHON_CODE'
from importlib.metadata import PackageNotFoundError, version

for name in ("torch", "torchvision", "triton", "transformer_engine", "apex", "flash_attn", "numpy"):
    try:
        print(f"{name}=={version(name)}")
    except PackageNotFoundError:
        pass
PYTHON_CODE

# What megatron-core[training] and this package ask for beside torch. pip leaves alone what the
# image already has. The last line stops the build if another torch came in all the same.
RUN pip install --no-cache-dir --constraint /tmp/pinned.txt \
        accelerate flask-restful omegaconf "packaging>=24.2" psutil sentencepiece tabulate \
        tensorboard tiktoken tokenizers tqdm transformers wandb \
    && pip install --no-cache-dir --no-deps "megatron-core==${MEGATRON_CORE_VERSION}" \
    && grep '^torch==' /tmp/pinned.txt \
    && python -c "from importlib.metadata import version; \
pinned = open('/tmp/pinned.txt').read().split(); \
assert 'torch==' + version('torch') in pinned, 'the torch of the image was replaced'"

# The wheel, as a release has it.
FROM base AS wheel
WORKDIR /source
COPY . .
# --no-build-isolation: the image's setuptools will do, and the build needs no registry.
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

FROM base
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir --no-deps --no-index /wheels/*.whl
# Scripts, jobs and patches; not the sources of the package, which would be found before the wheel.
WORKDIR /workspace/megatron_laep
COPY pyproject.toml README.md ./
COPY configs configs
COPY patches patches
COPY scripts scripts
RUN python scripts/check_environment.py train && python -c "import megatron_laep"
