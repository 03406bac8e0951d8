"""Train in a loop of your own, ``for batch in batches``, in ten lines: the parts of ``train`` are public."""

import torch

import phi3lora as p3

model, tokenizer, train_set, eval_set = p3.demo.load()
p3.inject_lora(model, p3.LoraConfig(r=8))
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
model.train()
for batch in p3.batches(train_set, batch_size=4, seed=0):
    loss_sum, count = p3.causal_lm_loss(model, batch)
    (loss_sum / count).backward()
    optimizer.step()
    optimizer.zero_grad()
torch.save(p3.lora_state_dict(model), "ckpt_lora.pt")
print(p3.evaluate(model, eval_set))
