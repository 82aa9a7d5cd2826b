"""What several engines need of models in the formats of Hugging Face: tokenizer, adapters, comparison of weights."""
