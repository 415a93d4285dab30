# The plant chatbot: no torch, no vLLM; versions as the lock has them.
FROM python:3.11.13-slim-bookworm
RUN useradd --create-home looktwice && install -d -o looktwice /data
WORKDIR /opt/looktwice
COPY . .
RUN pip install --no-cache-dir --constraint requirements/cpu.lock '.[chatbot]'
USER looktwice
ENV XDG_DATA_HOME=/data
EXPOSE 7860
ENTRYPOINT ["looktwice"]
CMD ["chatbot", "--host", "0.0.0.0"]
