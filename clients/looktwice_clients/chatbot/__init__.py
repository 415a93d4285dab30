"""The plant chatbot: a page in the browser, and the history behind it (`looktwice chatbot`)."""
