"""CIFAR-10: a ResNet-56 teacher and a ResNet-8 student; and the pair of He's study, Caffe's "quick" and "mini".

    kdistill run cifar10 --data-dir FOLDER                    the binary version, as folder or cifar-10-binary.tar.gz
    kdistill run cifar10 --download                           through TensorFlow Datasets
    kdistill run cifar10 --variant quick --data-dir FOLDER    quick teaches mini: lambda 0.1, T = 1, plain SGD
    kdistill run cifar10 --variant smoke --data-dir FOLDER    tiny: for tests

Cost: 182 epochs of ResNet-56 and twice 182 of ResNet-8; this needs a GPU. Neither variant has been run here at full
size, so there is no measured result. Published by others, with other settings:
- ResNet-56: 93.03 % (He et al. 2015, arXiv 1512.03385, table 6; there on all 50,000 training images, 45,000 here).
- quick about 80 to 81 %, mini alone 78 %; with lambda 0.1 mini is better for 20,000 iterations, then 77 % (He 2017,
  which does not describe mini in full: see `cifar_mini` in `kdistill.networks.architectures`).
"""

import dataclasses

from kdistill.recipe import Data, Distill, Network, Recipe, Training


def recipe(variant: str = "default") -> Recipe:
    """Variants: `default`; `quick`, the networks and the schedule of He's study; `smoke`, two epochs on few images."""
    if variant in ("default", "smoke"):
        long = Training(
            epochs=182,
            batch_size=128,
            optimizer="sgd",
            learning_rate=0.1,
            momentum=0.9,
            # Decoupled: 1e-4 through the gradient, times 1 / (1 - momentum).
            weight_decay=1e-3,
            warmup=0.02,
        )
        base = Recipe(
            name="cifar10",
            variant=variant,
            data=Data("cifar10", validation=0.1, shift=4, flip=True),
            teacher=Network("resnet", {"depth": 56, "width": 16}),
            student=Network("resnet", {"depth": 8, "width": 16}),
            teacher_training=long,
            training=long,
            distill=Distill(distillation_weight=0.9, temperature=4.0),
        )
        if variant == "default":
            return base
        short = Training(epochs=2, batch_size=16, learning_rate=3e-3)
        return dataclasses.replace(
            base,
            data=dataclasses.replace(base.data, validation=0.25, train_limit=640),
            teacher=Network("resnet", {"depth": 8, "width": 8}),
            student=Network("resnet", {"depth": 8, "width": 4}),
            teacher_training=short,
            training=short,
            exports=("reference",),
        )
    if variant == "quick":
        # Caffe's cifar10_quick_solver: 4,000 of 5,000 iterations at 0.001, the rest at a tenth of it. Its decay of
        # 0.004 acts through the gradient; decoupled decay is that times 1 / (1 - momentum). Five times as long as
        # Caffe's, for the study's 20,000 iterations.
        caffe = Training(
            epochs=55,
            batch_size=100,
            optimizer="sgd",
            learning_rate=1e-3,
            momentum=0.9,
            weight_decay=0.04,
            schedule="step",
            drop_at=0.8,
            drop_factor=0.1,
        )
        return Recipe(
            name="cifar10",
            variant=variant,
            data=Data("cifar10", validation=0.1),
            teacher=Network("cifar_quick"),
            student=Network("cifar_mini"),
            teacher_training=caffe,
            training=caffe,
            distill=Distill(distillation_weight=0.1, temperature=1.0),
        )
    raise KeyError(variant)
