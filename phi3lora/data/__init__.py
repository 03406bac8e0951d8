"""The data: chats to tokens, masks, rows and batches. Takes a tokenizer, yields CPU tensors, knows no model."""
