# The server on a CPU, with the small model that ships with the repository.
FROM python:3.11.13-slim-bookworm
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libnuma1 make \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home looktwice \
 && install -d -o looktwice /opt/looktwice /data/references
USER looktwice
WORKDIR /opt/looktwice
COPY --chown=looktwice . .
RUN make setup
ENV PATH=/opt/looktwice/.venv/bin:$PATH
EXPOSE 8000
ENTRYPOINT ["looktwice"]
CMD ["serve", "nano", "--host", "0.0.0.0"]
