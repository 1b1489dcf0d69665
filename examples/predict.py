"""Predict what is on one image, with weights that a run has kept.

python airbench94.py --save --out logs/mine
python -m examples.predict logs/mine/runs/00000.pt cat.png
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import airbench94 as ab


def load_image(path):
    """An image file as uint8 (1, 32, 32, 3): its middle square, made smaller."""
    image = Image.open(path).convert('RGB')
    side = min(image.size)
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((32, 32))
    return torch.from_numpy(np.array(image))[None]


def predict(weights, pixels):
    """[(class, probability), ...] of uint8 (1, 32, 32, 3), the most probable first."""
    net, saved = ab.load_network(weights, device='cpu', dtype=torch.float32)
    net.eval()
    mean = 255 * torch.tensor(saved['mean'])
    scale = 1 / (255 * torch.tensor(saved['std']))
    inputs = ab.normalize(pixels, mean, scale, torch.float32)
    with torch.no_grad():
        views = ab.tta_views(inputs, saved['hyp']['net']['tta_level'])
        logits = sum(weight * net(view) for weight, view in views)
    probabilities = logits.softmax(1)[0].tolist()
    ranking = sorted(zip(probabilities, saved['classes']), reverse=True)
    return [(name, probability) for probability, name in ranking]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('weights', type=Path, help='a file that --save has written')
    parser.add_argument('image', type=Path, help='a picture, of any size')
    args = parser.parse_args(argv)
    for name, probability in predict(args.weights, load_image(args.image))[:3]:
        print(f'{probability:6.1%}  {name}')
    return 0


if __name__ == '__main__':
    raise SystemExit(ab.report_errors(main))
