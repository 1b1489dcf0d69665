"""Train, then train again on the 60% of the images about which the first network is least sure.

python -m examples.subset            # CIFAR-10
python -m examples.subset digits
"""

import sys

import airbench94 as ab
from lab.errors import report_errors


def train_on_the_hardest(train_loader, test_loader, hyp):
    """(accuracy after training on all images, accuracy after training on 60% of them)"""
    net, of_all = ab.train(train_loader, test_loader, hyp)

    confidence = ab.infer(net, train_loader).softmax(1).amax(1)
    hardest = confidence.argsort()[: int(0.6 * len(confidence))]
    train_loader.images = train_loader.images[hardest]
    train_loader.labels = train_loader.labels[hardest]
    _, of_hardest = ab.train(train_loader, test_loader, hyp, seed=1)
    return of_all['tta_val_acc'], of_hardest['tta_val_acc']


def main(data=None):
    ab.keep_freed_memory()
    device, dtype = ab.pick_device()
    _, hyp, statistics, *sets = ab.load_sets(data)
    loaders = ab.make_loaders(*sets, hyp, device=device, dtype=dtype, **statistics)
    of_all, of_hardest = train_on_the_hardest(*loaders, hyp)
    print(f'all images: {of_all:.4f}, the hardest 60%: {of_hardest:.4f}')
    return 0


if __name__ == '__main__':
    sys.exit(report_errors('examples.subset', main, *sys.argv[1:2]))
