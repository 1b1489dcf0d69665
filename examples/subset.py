"""Train, then train again on the 60% of the images of which the first network was least sure.

python -m examples.subset            # CIFAR-10
python -m examples.subset digits     # or the folder of another set
"""

import sys

import airbench94 as ab


def train_on_the_hardest(data, hyp, device, dtype):
    """(accuracy of a training on all images, accuracy of one on 60% of them)"""
    options = {'device': device, 'dtype': dtype}
    batch_size = hyp['opt']['batch_size']
    train_loader = ab.CifarLoader(data, True, batch_size, hyp['aug'], **options)
    test_loader = ab.CifarLoader(data, False, **options)
    net, of_all = ab.train(train_loader, test_loader, hyp)

    confidence = ab.infer(net, train_loader).softmax(1).amax(1)
    hardest = confidence.argsort()[: int(0.6 * len(confidence))]
    train_loader.images = train_loader.images[hardest]
    train_loader.labels = train_loader.labels[hardest]
    net, of_hardest = ab.train(train_loader, test_loader, hyp, seed=1)
    return of_all['tta_val_acc'], of_hardest['tta_val_acc']


def main():
    data = (sys.argv[1:] or ['cifar10'])[0]
    hyp = ab.hyp
    if data == 'cifar10':
        ab.download_cifar10(data)
    elif data == 'digits':
        hyp = ab.override(hyp, ab.DIGITS)
    device = ab.pick_device()
    dtype = ab.pick_dtype(None, device)
    of_all, of_hardest = train_on_the_hardest(data, hyp, device, dtype)
    print(f'all images: {of_all:.4f}, the hardest 60%: {of_hardest:.4f}')
    return 0


if __name__ == '__main__':
    ab.keep_freed_memory()
    sys.exit(ab.report_errors(main))
