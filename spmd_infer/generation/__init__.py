"""From prompts to text: tokenizers, chat templates, sampling, caches and the decode loop."""
