"""Folders of Hugging Face's transformers: which decoders their Llama and GPT-2 formats hold, writing and reading them.

A folder is `config.json`, `generation_config.json` and weights as safetensors. The files of its tokenizer are written
and read by others. `formats.py`, `llama.py` and `gpt2.py` say what is where and need no torch; `writing.py` and
`reading.py` move the weights.
"""
