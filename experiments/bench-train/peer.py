"""PyTorch's side of the comparison: a Llama-family model of random weights, LoRA of one rank on all
seven matrices of each layer (or every weight trained), AdamW, cross-entropy on every position.
Prints one JSON object. See README.md."""
import argparse
import json
import resource
import time

import torch
import torch.nn.functional as F


def arguments():
    p = argparse.ArgumentParser()
    for name, value in [("width", 576), ("layers", 30), ("heads", 9), ("kv-heads", 3),
                        ("ffn", 1536), ("vocab", 49152), ("rank", 8), ("batch", 4),
                        ("context", 128), ("steps", 4), ("threads", 2)]:
        p.add_argument("--" + name, type=int, default=value)
    p.add_argument("--full", action="store_true", help="train every weight")
    return p.parse_args()


class Linear(torch.nn.Module):
    """x W^T, and beside it scale * B A."""

    def __init__(self, inputs, outputs, o):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(outputs, inputs) * 0.02, o.full)
        self.a = self.b = None
        if not o.full:
            self.a = torch.nn.Parameter(torch.randn(o.rank, inputs) / inputs ** 0.5)
            self.b = torch.nn.Parameter(torch.zeros(outputs, o.rank))

    def forward(self, x):
        y = F.linear(x, self.weight)
        return y if self.a is None else y + 2 * F.linear(F.linear(x, self.a), self.b)


def norm(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w


def turn(x, cosines, sines):
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cosines - b * sines, a * sines + b * cosines), -1).flatten(-2)


class Layer(torch.nn.Module):
    def __init__(self, o):
        super().__init__()
        self.o, self.size = o, o.width // o.heads
        kv = o.kv_heads * self.size
        self.q, self.k, self.v = (Linear(o.width, n, o) for n in (o.width, kv, kv))
        self.out = Linear(o.width, o.width, o)
        self.gate, self.up = Linear(o.width, o.ffn, o), Linear(o.width, o.ffn, o)
        self.down = Linear(o.ffn, o.width, o)
        self.norms = torch.nn.Parameter(torch.ones(2, o.width), o.full)

    def forward(self, x, mask, cosines, sines):
        o, (batch, length, _) = self.o, x.shape
        n = norm(x, self.norms[0])
        q = self.q(n).view(batch, length, o.heads, self.size).transpose(1, 2)
        k = self.k(n).view(batch, length, o.kv_heads, self.size).transpose(1, 2)
        v = self.v(n).view(batch, length, o.kv_heads, self.size).transpose(1, 2)
        q, k = turn(q, cosines, sines), turn(k, cosines, sines)
        k, v = (t.repeat_interleave(o.heads // o.kv_heads, 1) for t in (k, v))
        p = torch.softmax(q @ k.transpose(-1, -2) / self.size ** 0.5 + mask, -1)
        x = x + self.out((p @ v).transpose(1, 2).reshape(batch, length, o.width))
        n = norm(x, self.norms[1])
        return x + self.down(F.silu(self.gate(n)) * self.up(n))


class Model(torch.nn.Module):
    def __init__(self, o):
        super().__init__()
        self.embedding = torch.nn.Parameter(torch.randn(o.vocab, o.width) * 0.02, o.full)
        self.layers = torch.nn.ModuleList(Layer(o) for _ in range(o.layers))
        self.norm = torch.nn.Parameter(torch.ones(o.width), o.full)
        half = o.width // o.heads // 2
        angle = torch.outer(torch.arange(o.context), 10000.0 ** (-torch.arange(half) / half))
        self.cosines, self.sines = angle.cos(), angle.sin()
        self.mask = torch.full((o.context, o.context), float("-inf")).triu(1)

    def forward(self, tokens, targets):
        x = F.embedding(tokens, self.embedding)
        for layer in self.layers:
            x = layer(x, self.mask, self.cosines, self.sines)
        logits = F.linear(norm(x, self.norm), self.embedding)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main():
    o = arguments()
    torch.manual_seed(1)
    torch.set_num_threads(o.threads)
    model = Model(o)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0)
    rates = []
    for step in range(o.steps + 1):  # the first is not counted
        tokens = torch.randint(o.vocab, (o.batch, o.context + 1))
        begun = time.perf_counter()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.append(o.batch * o.context / (time.perf_counter() - begun))
    rates = sorted(rates[1:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"tokens_per_s": rates[len(rates) // 2], "peak_rss_bytes": peak,
                      "loss_last": loss.item(), "torch": torch.__version__}))


main()
