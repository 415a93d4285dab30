# The server on GPUs: vLLM's own image and this package; what the image has stays as it is, the rest is the lock's.
FROM vllm/vllm-openai:v0.32.0
WORKDIR /opt/looktwice
COPY . .
RUN python3 docker/constraints.py requirements/cpu.lock > /tmp/constraints.txt \
 && python3 -m pip install --no-cache-dir --constraint /tmp/constraints.txt '.[adapters]' \
 && install -d /data/references
# vLLM's Helm charts start `vllm serve MODEL ...`; here that is `looktwice serve MODEL ...`.
RUN printf '#!/bin/sh\nexec looktwice "$@"\n' > "$(command -v vllm)"
ENV LOOKTWICE_MODELS=/opt/looktwice/models
EXPOSE 8000
ENTRYPOINT ["looktwice"]
CMD ["serve", "nano", "--host", "0.0.0.0"]
