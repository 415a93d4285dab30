# The server on GPUs: vLLM's own image and this package; vLLM and torch stay as the image has them.
FROM vllm/vllm-openai:v0.32.0
WORKDIR /opt/looktwice
COPY . .
RUN python3 -c "import importlib.metadata as m; print('\n'.join(f'{p}=={m.version(p)}' for p in ('vllm', 'torch', 'torchvision', 'transformers')))" > /tmp/kept.txt \
 && python3 -m pip install --no-cache-dir --constraint /tmp/kept.txt '.[adapters]' \
 && install -d /data/references
# vLLM's Helm charts start `vllm serve MODEL ...`; here that is `looktwice serve MODEL ...`.
RUN printf '#!/bin/sh\nexec looktwice "$@"\n' > "$(command -v vllm)"
ENV LOOKTWICE_MODELS=/opt/looktwice/models
EXPOSE 8000
ENTRYPOINT ["looktwice"]
CMD ["serve", "nano", "--host", "0.0.0.0"]
