"""OpenAI's routes: chat, completions, models, files and fine-tuning."""
