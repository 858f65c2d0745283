"""Functions that compute along t in ways a table can forget, on ``x[b, t, s, c]`` of 8 frames."""

import torch
import torch.nn.functional as F

FRAMES = 8


def _attention(self, x):
    y = x.transpose(1, 2)
    return F.scaled_dot_product_attention(y, y, y).transpose(1, 2)


def _convolution(self, x):
    b, t, s, c = x.shape
    y = x.permute(0, 2, 3, 1).reshape(b * s, c, t)
    y = F.conv1d(y, self.linear.weight[:, :, None].expand(-1, -1, 3), padding=1)
    return y.reshape(b, s, c, t).permute(0, 3, 1, 2)


def _cls_token(self, x):
    return x + self.linear(x[:, :1])


def _scores(self, x):
    y = x.transpose(1, 2)
    return ((y @ y.mT).relu() @ y).transpose(1, 2)


def _hard_coded_view(self, x):
    return x.view(x.shape[0], FRAMES, -1, 4) + self.table[:FRAMES, None]


def _expanded(self, x):
    return x + self.table[: x.shape[1]].unsqueeze(1).expand(x.shape[1:])


ALONG_T = {
    "attention": _attention,
    "softmax": lambda self, x: self.linear(x).softmax(1),
    "mean": lambda self, x: x - x.mean(1, keepdim=True),
    "mean of all": lambda self, x: x - x.mean(),
    "maximum": lambda self, x: x - x.amax((1, 2), keepdim=True),
    "layer norm": lambda self, x: F.layer_norm(x.movedim(1, -1), (x.shape[1],)).movedim(-1, 1),
    "cumsum": lambda self, x: x + self.linear(x.cumsum(1)),
    "convolution": _convolution,
    "products of frames": _scores,
    "einsum": lambda self, x: x * torch.einsum("btsc,btsd->bcd", x, x)[:, None, :1],
    "flip": lambda self, x: x + self.linear(x.flip(1)),
    "shift": lambda self, x: x + self.linear(x.roll(1, 1)),
    "shift by slices": lambda self, x: torch.cat([x[:, 1:], x[:, :1]], 1) + x,
    "first frame": _cls_token,
    "sort": lambda self, x: x + x.sort(1)[0],
    "counted positions": lambda self, x: x + torch.arange(x.shape[1])[:, None, None] / 8,
    "sliced positions": lambda self, x: x + self.table[: x.shape[1], None],
    "expanded positions": _expanded,
    "looked-up positions": lambda self, x: x + self.table[torch.arange(x.shape[1])][:, None],
    "hard-coded view": _hard_coded_view,
    "hard-coded positions": lambda self, x: x + self.table[:FRAMES, None],
    "branch on the length": lambda self, x: x + self.table[0] if x.shape[1] > 4 else x * 1,
    "scale by the length": lambda self, x: self.linear(x) * x.shape[1] ** -0.5,
    "bias by the length": lambda self, x: x + self.linear.bias * x.shape[1],
    "entry by the length": lambda self, x: x + self.table[x.shape[1]],
    "tensor of the length": lambda self, x: x * torch.tensor(1.0 / x.shape[1]),
    "temporal merge and mean": lambda self, x: x - x.flatten(1, 2).mean(1)[:, None, None],
    "past an empty cache": lambda self, x: x + torch.cat([x[:, :0], x], 1).mean(1, keepdim=True),
    "histogram": lambda self, x: (
        x
        + x.new_zeros(3, 4).index_add(
            0, (torch.arange(x[..., 0].numel()) * 0 + 1), x.flatten(0, 2)
        )[1]
    ),
}
