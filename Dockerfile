# The workflow and all that it needs. See docs/containers.md.
#   docker build --tag mistral-prune-lora:cpu .
#   docker build --tag mistral-prune-lora:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
ARG PYTHON=3.11.13
FROM python:${PYTHON}-slim-bookworm

# Of one version, an index for each kind of machine: cpu, cu126, cu130, ... The CUDA wheels bring their own libraries, so
# that the image needs none; the host brings the driver and its container toolkit.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

WORKDIR /opt/mistral-prune-lora
COPY requirements.txt ./
# torch by itself and from its own index alone, since another one may offer a build of the same version for other machines.
RUN grep '^torch==' requirements.txt > /tmp/torch.txt \
    && pip install --no-cache-dir --index-url "${TORCH_INDEX}" --requirement /tmp/torch.txt \
    && pip install --no-cache-dir --requirement requirements.txt \
    && rm /tmp/torch.txt

COPY Snakefile config.yaml pyproject.toml README.md LICENSE ./
COPY configs configs
COPY envs envs
COPY lib lib
COPY profiles profiles
COPY report report
COPY rules rules
COPY workflow_scripts workflow_scripts
# Compiled once, since whoever runs it may not be allowed to write here.
RUN python -m compileall -q lib

# The user may be anybody (`docker run --user`), without a home and a name of his own: Python would look for the name in
# a list that does not have him, and snakemake ends where there is none.
ENV PYTHONPATH=/opt/mistral-prune-lora/lib HOME=/tmp USER=anybody
WORKDIR /work
ENTRYPOINT ["snakemake", "--snakefile", "/opt/mistral-prune-lora/Snakefile"]
CMD ["--help"]
