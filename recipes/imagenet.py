"""ImageNet 2012: a trained ResNet-50 teaches MobileNetV3-Small. Both preprocess the same pixels in their own way.

    kdistill run imagenet --data-dir FOLDER --download    FOLDER/train and FOLDER/val, JPEGs in a folder per class
    kdistill run imagenet --data-dir FOLDER --set teacher.options.weights=FILE.h5    without downloads
    kdistill run imagenet --variant vgg16 ...                 the teacher of He's study, which did not train it
    kdistill run imagenet --variant imagenette --data-dir FOLDER         on two cores: the ten classes of Imagenette
    kdistill run imagenet --variant imagenette_few --data-dir FOLDER     students see a tenth of its labels
    kdistill run imagenet --variant smoke --data-dir FOLDER   tiny, any classes: for tests

Without --data-dir the recipe uses imagenet2012 as prepared by TensorFlow Datasets. With --download Keras downloads
the teacher's weights. Cost: 90 epochs for the control and 90 for the student: days on one GPU, hours on eight. All
images are decoded once before training, to detect damaged files. mixed_float16 needs a GPU (without one: --set
precision=mixed_bfloat16). The recipe has not been run here at full size, so there is no measured result. Published
top-1: ResNet50 74.9 %, VGG16 71.3 % (the weights of keras.applications, keras.io/api/applications); MobileNetV3-Small
67.4 % (Howard et al., arXiv 1905.02244).

`imagenette`: FOLDER/train and FOLDER/val of Imagenette (J. Howard, fast.ai), 9,469 and 3,925 photographs of ten
classes, at 96 pixels, through the same loader, crops and flips. The teacher, `cifar_vgg` with a stride of 2, is trained
in the run for 30 epochs, once for all seeds; control and student are the minimalistic MobileNetV3-Small (ReLU, no
squeeze-and-excitation), 30 epochs each. The teacher computes in bfloat16, which makes depthwise convolutions slower. An
hour on two busy cores: teacher 87.08 %, student 80.96 against 80.13 % (+0.83, -3.87 to +5.52, two seeds: UNDECIDED).
`imagenette_few`: as if the teacher came from elsewhere, trained on all labels (`--teacher RUN/teacher.keras` takes the
one of `imagenette`); control and student have a tenth of them, the student all photographs. 80.78 against 62.19 %,
+18.59 (+7.74 to +29.43, two seeds): BETTER. More in `docs/experiments.md`.

Labels are not smoothed: a teacher trained with label smoothing teaches worse, because smoothing removes the differences
among the wrong classes (Mueller, Kornblith, Hinton 2019, arXiv 1906.02629).
"""

import dataclasses

from kdistill.recipe import Cache, Data, Distill, Network, Recipe, Training


def recipe(variant: str = "default") -> Recipe:
    """Variants: `default`; `vgg16`, with this teacher; `imagenette`, ten classes at 96 pixels; `imagenette_few`, with a
    tenth of its labels; `smoke`, a few epochs of a small teacher on few images."""
    if variant in ("imagenette", "imagenette_few"):
        return imagenette(variant)
    if variant not in ("default", "vgg16", "smoke"):
        raise KeyError(variant)
    long = Training(
        epochs=90,
        batch_size=1024,
        optimizer="sgd",
        learning_rate=0.4,
        momentum=0.9,
        weight_decay=4e-4,  # decoupled: 4e-5 through the gradient, times 1 / (1 - momentum)
        warmup=0.05,
    )
    base = Recipe(
        name="imagenet",
        variant=variant,
        data=Data("imagenet", image_size=224, validation=0.01, flip=True, crop_area=0.25),
        teacher=Network("vgg16" if variant == "vgg16" else "resnet50", {"weights": "imagenet"}),
        student=Network("mobilenet_v3_small", {"dropout_rate": 0.0}),
        teacher_training=long,
        training=long,
        distill=Distill(distillation_weight=0.9, temperature=2.0),
        precision="mixed_float16",
    )
    if variant != "smoke":
        return base
    short = Training(epochs=6, batch_size=8, learning_rate=2e-3)
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, validation=0.25, train_limit=64),
        teacher=Network("mobilenet_v2", {"size": 32, "alpha": 0.35, "momentum": 0.8}),
        # With the usual momentum of 0.999, the moving statistics would need thousands of steps.
        student=Network("mobilenet_v3_small", {"size": 224, "dropout_rate": 0.0, "momentum": 0.8}),
        teacher_training=short,
        training=short,
        exports=("npu",),
        precision="float32",
    )


def imagenette(variant: str) -> Recipe:
    """Ten classes of ImageNet on two cores."""
    few = variant == "imagenette_few"
    return Recipe(
        name="imagenet",
        variant=variant,
        data=Data(
            "imagenet",
            image_size=96,
            validation=0.2 if few else 0.05,  # of the labeled photographs
            flip=True,
            crop_area=0.35,
            labeled=946 if few else None,
        ),
        teacher=Network("cifar_vgg", {"widths": (64, 128, 256, 256), "stride": 2}),
        # With its own momentum of 0.999, normalization would need thousands of steps.
        student=Network(
            "mobilenet_v3_small", {"size": 96, "minimalistic": True, "dropout_rate": 0.0, "momentum": 0.95}
        ),
        teacher_training=Training(
            epochs=30,
            batch_size=256,
            optimizer="sgd",
            learning_rate=0.2,
            momentum=0.9,
            weight_decay=1e-2,  # decoupled: 1e-3 through the gradient
            warmup=0.2,
        ),
        training=Training(epochs=30, batch_size=64, learning_rate=3e-3, weight_decay=0.02, warmup=0.1),
        distill=Distill(distillation_weight=0.9, temperature=4.0),
        # The seeds share their views: the teacher runs once for all of them.
        cache=Cache(seed=0),
        seeds=2,
        teacher_precision="mixed_bfloat16",  # in bfloat16, the student would take longer
    )
