"""A real SGLang server on a GPU machine that has torch and no network: build, assemble, run."""
