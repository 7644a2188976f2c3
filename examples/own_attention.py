"""One op in an attention module that is not ours: output and alignment with a teacher's attention in the same pass.

    python examples/own_attention.py

Needs torch alone. The student has the usual attention block; `attention_with_alignment` stands where
`scaled_dot_product_attention` stood, and gives one loss per sample beside the output.
"""

import torch
from torch import nn

from cdistill.ops import attention_slice, attention_with_alignment

B, T, WIDTH, HEADS = 4, 48, 64, 4
torch.manual_seed(0)


class Attention(nn.Module):
    """Causal self-attention as everybody writes it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def project(self, x):
        return (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2))  # (B, H, T, D)

    def forward(self, x, target, rows, cols):
        q, k, v = self.project(x)
        # was: y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y, loss = attention_with_alignment(q, k, v, target, rows, cols, loss="cosine")
        return self.out(y.transpose(1, 2).flatten(2)), loss


teacher, student = Attention().requires_grad_(False), Attention()
teacher.qkv.weight.mul_(4)  # it looks at some keys more than at others
x = torch.randn(B, T, WIDTH)  # 32 visual tokens, then text
cols = torch.arange(32).expand(B, -1)  # the keys that are compared: (B, V) positions of visual tokens, -1 = padding
rows = torch.arange(40, 48).expand(B, -1)  # the queries: (B, R) positions of answer tokens

q, k, _ = teacher.project(x)
# (B, R, V), the mean over heads; rows are normalised over all keys before they are cut
target = attention_slice(q, k, rows, cols)

optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
history = []
for step in range(30):
    y, loss = student(x, target, rows, cols)
    (y.square().mean() * 0.01 + loss.mean()).backward()  # your own loss, and the alignment
    optimizer.step()
    optimizer.zero_grad()
    history.append(loss.mean().item())
    if step % 5 == 0:
        print(f"step {step}  alignment {history[-1]:.4f}")

print(f"alignment loss {history[0]:.3f} -> {history[-1]:.3f}")
