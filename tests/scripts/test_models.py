"""The networks of both scripts: known sizes, output shapes, the order of parameters, the first weights."""

import functools
import math
import re

import imagenet_resnet
import pytest
import torch
import torchvision
from cifar_models import FAMILIES, MODELS, build_model, model_names
from torch import nn
from torch.nn.functional import cross_entropy

from sparselearning.process.errors import UsageError
from sparselearning.sparse.layers import maskable_parameters

FAMILY_MEMBERS = {
    "wrn-D-K": ["wrn-28-10", "wrn-16-8", "wrn-16-10", "wrn-10-1"],
    "cifar_resnet_N[_W]": ["cifar_resnet_8_4", "cifar_resnet_20", "cifar_resnet_32", "cifar_resnet_56_32"],
}
ALL_NAMES = [*MODELS, *(name for members in FAMILY_MEMBERS.values() for name in members)]
SMALL_NAMES = ["ResNet18", "vgg11", "vgg-like", "wrn-10-1", "cifar_resnet_8_4", "lenet-300-100", "lenet5"]


@functools.cache
def on_meta(name, *args):
    """The model without storage, which tests read and none changes: shapes are checked, nothing is computed."""
    with torch.device("meta"):
        return build_model(name, *args).eval()


def count(model, dims=(1, 2, 4)):
    return sum(p.numel() for p in model.parameters() if p.dim() in dims)


def maskable(model):
    return [p for p in model.parameters() if p.dim() in (2, 4)]


@pytest.mark.parametrize("name", [*ALL_NAMES, *imagenet_resnet.RESNETS])
def test_masks_are_for_every_matrix_and_kernel(name):
    with torch.device("meta"):
        model = on_meta(name, 10) if name in ALL_NAMES else imagenet_resnet.build_model(name, 10)
    assert list(maskable_parameters(model).values()) == maskable(model)


def test_every_family_has_members_here():
    assert set(FAMILY_MEMBERS) == set(FAMILIES)
    assert model_names() == [*MODELS, *FAMILIES]


@pytest.mark.parametrize(
    ("name", "classes", "channels", "size", "expected"),
    [
        # By hand: 784·300 + 300 + 300·100 + 100 + 100·10 + 10.
        ("lenet-300-100", 10, 1, 28, 266_610),
        # By hand: 20·25 + 20 + 50·20·25 + 50 + (50·4·4)·500 + 500 + 500·10 + 10.
        ("lenet5", 10, 1, 28, 431_080),
        # The figures of the usual implementations.
        ("ResNet18", 10, 3, 32, 11_173_952),
        ("ResNet50", 100, 3, 32, 23_705_152),
        ("vgg16", 10, 3, 32, 14_724_042),
        # vgg16 and: 4,224 biases of convolutions, a hidden layer, its BatchNorm.
        ("vgg-like", 10, 3, 32, 14_724_042 + 4_224 + (512 * 512 + 512) + 2 * 512),
        ("wrn-28-10", 10, 3, 32, 36_479_194),
        ("wrn-16-8", 10, 3, 32, 10_961_370),
        ("cifar_resnet_20", 10, 3, 32, 272_474),
    ],
)
def test_parameter_counts(name, classes, channels, size, expected):
    assert count(on_meta(name, classes, channels, size)) == expected


def test_resnet50_for_cifar100_has_the_published_number_of_maskable_weights():
    assert count(on_meta("ResNet50", 100), dims=(2, 4)) == 23_652_032


@pytest.mark.parametrize(
    ("name", "weight_layers"),
    [
        *((name, int(name.removeprefix("ResNet"))) for name in MODELS if name.startswith("ResNet")),
        *[("cifar_resnet_8", 8), ("cifar_resnet_110", 110), ("wrn-16-8", 14), ("wrn-28-10", 26)],
        # VGG's names count the three linear layers of the paper; here there is one.
        *[("vgg11", 9), ("vgg13", 11), ("vgg16", 14), ("vgg19", 17), ("vgg-like", 15)],
    ],
)
def test_number_of_layers_outside_shortcuts(name, weight_layers):
    weights = [key for key, p in on_meta(name, 10).named_parameters() if p.dim() in (2, 4)]
    assert sum("downsample" not in key and "shortcut" not in key for key in weights) == weight_layers


@pytest.mark.parametrize("name", ALL_NAMES)
@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 28)])
def test_images_of_each_data_set_give_one_logit_per_class(name, channels, size):
    model = on_meta(name, 7, channels, size)
    assert model(torch.empty(2, channels, size, size, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("name", ALL_NAMES)
def test_first_parameter_is_the_first_layer_and_last_matrix_the_classifier(name):
    model = on_meta(name, 7, 3, 32)
    weights = maskable(model)
    assert next(model.parameters()) is weights[0]
    assert weights[0].shape[1] in (3, 3 * 32 * 32)
    assert weights[-1].dim() == 2
    assert weights[-1].shape[0] == 7
    assert sum(w.shape[0] == 7 for w in weights) == 1


def test_widths_of_the_slim_and_the_wide_family():
    slim = [p.shape[0] for p in maskable(on_meta("cifar_resnet_14_6", 10))]
    assert sorted(set(slim)) == [6, 10, 12, 24]
    wide = [p.shape[0] for p in maskable(on_meta("wrn-10-3", 10))]
    assert sorted(set(wide)) == [10, 16, 48, 96, 192]


@pytest.mark.parametrize("name", SMALL_NAMES)
def test_every_parameter_gets_a_finite_gradient(name):
    model = build_model(name, 10)
    cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.tensor([1, 2])).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize("name", SMALL_NAMES)
def test_channels_last_gives_the_same_logits(name):
    model = build_model(name, 10).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    model.to(memory_format=torch.channels_last)
    actual = model(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SMALL_NAMES)
def test_compiles_to_one_graph(name):
    model = build_model(name, 10).eval()
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))


def kaiming(fan):
    """Standard deviation of Kaiming normal weights that go into a ReLU (gain √2)."""
    return math.sqrt(2 / fan)


def default(fan_in):
    """Of PyTorch's default, uniform in ±1/√fan_in: weights and biases alike."""
    return math.sqrt(1 / (3 * fan_in))


# Family: (standard deviation of a convolution's weights, of a linear layer's, of a linear layer's bias), each of the
# layer's (fan_in, fan_out). Biases of convolutions, where there are any, are PyTorch's default.
FIRST_WEIGHTS = {
    "default": (lambda i, o: default(i), lambda i, o: default(i), lambda i, o: default(i)),
    "slim": (lambda i, o: kaiming(i), lambda i, o: kaiming(i), lambda i, o: default(i)),
    "vgg": (lambda i, o: kaiming(o), lambda i, o: 0.01, lambda i, o: 0),
    "wide": (lambda i, o: kaiming(o), lambda i, o: default(i), lambda i, o: 0),
}


def assert_deviation(values, expected, what):
    """Five standard errors of a normal sample's deviation; its mean is zero within as many."""
    margin = 5 / math.sqrt(2 * values.numel())
    assert values.std(unbiased=False).item() == pytest.approx(expected, rel=margin), what
    assert abs(values.mean().item()) <= 5 * expected / math.sqrt(values.numel()), what


DEEPER = ["ResNet34", "ResNet101"]  # of the same blocks as ResNet18 and ResNet50


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *((name, "default") for name in MODELS if name not in DEEPER and not re.fullmatch(r"vgg\d+", name)),
        *((f"vgg{depth}", "vgg") for depth in (11, 16)),
        *[("cifar_resnet_20", "slim"), ("cifar_resnet_8_32", "slim"), ("wrn-16-4", "wide"), ("wrn-10-10", "wide")],
    ],
)
def test_first_weights_of_every_layer_are_the_published_ones(name, family):
    torch.manual_seed(0)
    conv_weight, linear_weight, linear_bias = FIRST_WEIGHTS[family]
    layers = 0
    for key, module in build_model(name, 50).named_modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert (module.weight == 1).all(), key
            assert (module.bias == 0).all(), key
        elif isinstance(module, nn.Conv2d | nn.Linear):
            layers += 1
            outputs, inputs, *kernel = module.weight.shape
            fans = inputs * math.prod(kernel), outputs * math.prod(kernel)
            is_conv = isinstance(module, nn.Conv2d)
            assert_deviation(module.weight, (conv_weight if is_conv else linear_weight)(*fans), key)
            if module.bias is not None:
                assert_deviation(module.bias, default(fans[0]) if is_conv else linear_bias(*fans), f"{key}.bias")
    assert layers == len(maskable(on_meta(name, 50)))


@pytest.mark.parametrize("name", ["vgg11", "vgg13", "vgg16", "vgg19", "vgg-like"])
def test_vgg_has_five_poolings_of_which_only_vgg_like_ends_in_a_maximum(name):
    poolings = [m for m in on_meta(name, 10).features if isinstance(m, nn.MaxPool2d | nn.AvgPool2d)]
    last = nn.MaxPool2d if name == "vgg-like" else nn.AvgPool2d
    assert [type(m) for m in poolings] == [nn.MaxPool2d] * 4 + [last]


@pytest.mark.parametrize("size", [28, 32, 33])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_average_at_the_end_of_vgg_is_over_pixels_of_the_image_alone(size, channels):
    """A pooling window that reaches over the border counts what lies inside."""
    model = on_meta("vgg11", 10, channels, size)
    assert model.features(torch.empty(1, channels, size, size, device="meta")).shape[2:] == ((1, 1), (2, 2))[size > 32]
    last = model.features[-1]
    torch.testing.assert_close(last(torch.full((1, 1, 3, 3), 7.0)), torch.full((1, 1, 2, 2), 7.0))


def test_head_of_vgg_like_and_the_biases_of_its_convolutions():
    model = on_meta("vgg-like", 10)
    assert [type(m) for m in model.classifier] == [nn.Linear, nn.ReLU, nn.BatchNorm1d, nn.Linear]
    assert [tuple(m.weight.shape) for m in model.classifier if isinstance(m, nn.Linear)] == [(512, 512), (10, 512)]
    for name, has_bias in (("vgg-like", True), ("vgg16", False)):
        convs = [m for m in on_meta(name, 10).modules() if isinstance(m, nn.Conv2d)]
        assert [conv.bias is not None for conv in convs] == [has_bias] * 13
    assert not [m for name in ALL_NAMES for m in on_meta(name, 10).modules() if isinstance(m, nn.Dropout)]


@pytest.mark.parametrize("name", SMALL_NAMES)
def test_one_image_alone_is_evaluated_as_among_others(name):
    model = build_model(name, 10).eval()
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(model(images[:1]), model(images)[:1], rtol=1e-4, atol=1e-5)


def test_same_seed_same_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(build_model("cifar_resnet_8_4", 10).parameters())

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


@pytest.mark.parametrize(
    "name", ["", "ResNet51", "resnet50", "vgg11 ", "wrn-28", "wrn-16-0", "wrn-28-10-2", "cifar_resnet_20_0"]
)
def test_unknown_names_list_what_exists(name):
    with pytest.raises(UsageError, match=f"unknown model '{name}'") as error:
        build_model(name, 10)
    assert all(known in str(error.value) for known in model_names())


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("wrn-15-2", r"wrn-15-2 does not exist.*6n \+ 4"),
        ("wrn-4-2", r"wrn-4-2 does not exist.*6n \+ 4"),
        ("cifar_resnet_21", r"cifar_resnet_21 does not exist.*6n \+ 2"),
        ("cifar_resnet_2_16", r"cifar_resnet_2 does not exist.*6n \+ 2"),
        ("cifar_resnet_1", r"cifar_resnet_1 does not exist.*6n \+ 2"),
    ],
)
def test_impossible_depths_say_which_exist(name, rule):
    with pytest.raises(UsageError, match=rule):
        build_model(name, 10)


def test_lenet5_refuses_images_that_its_pooling_uses_up():
    assert on_meta("lenet5", 10, 1, 16)(torch.empty(2, 1, 16, 16, device="meta")).shape == (2, 10)
    with pytest.raises(UsageError, match="16 x 16"):
        build_model("lenet5", 10, 1, 15)


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("resnet152", 60_192_808),
    ],
)
def test_imagenet_networks(arch, expected):
    with torch.device("meta"):
        model = imagenet_resnet.build_model(arch).eval()
        reference = torchvision.models.get_model(arch)
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    assert count(model) == expected
    assert model.state_dict().keys() == reference.state_dict().keys()
    assert maskable(model)[0] is model.conv1.weight
    assert maskable(model)[-1] is model.fc.weight
    assert model.fc.bias is not None


def test_imagenet_bottlenecks_have_their_stride_in_the_3x3():
    with torch.device("meta"):
        block = imagenet_resnet.build_model("resnet50").layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))


@pytest.mark.parametrize("init", imagenet_resnet.INITS)
def test_imagenet_initialisation_follows_the_flag(init):
    torch.manual_seed(0)
    model = imagenet_resnet.build_model("resnet18", num_classes=5, init=init)
    assert model.fc.out_features == 5
    # conv1 is 64 x 3 x 7 x 7, the stage's first 3x3 goes from 64 to 128 channels: the two fans differ.
    fans = {"classic": (64 * 49, 128 * 9), "fanin": (3 * 49, 64 * 9)}[init]
    for weight, fan in zip((model.conv1.weight, model.layer2[0].conv1.weight), fans, strict=True):
        assert weight.std().item() == pytest.approx(math.sqrt(2 / fan), rel=0.05)
    assert all((m.weight == 1).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize(
    ("arch", "init", "message"),
    [
        ("vit_b16", "classic", "'vit_b16': the nearest .* are vit_b_16,"),
        ("resnet50", "fan_in", "'fan_in': choose one of"),
    ],
)
def test_imagenet_refuses_unknown_choices(arch, init, message):
    with pytest.raises(UsageError, match=message):
        imagenet_resnet.build_model(arch, init=init)


def test_imagenets_networks_are_torchvisions_classification_networks():
    assert {"alexnet", "vit_b_16", "convnext_tiny", "maxvit_t", "swin_v2_t", *imagenet_resnet.RESNETS} <= {
        *imagenet_resnet.ARCHS
    }
    others = ("fcn_resnet50", "fasterrcnn_resnet50_fpn", "quantized_resnet50", "r3d_18", "raft_small")
    assert not {*others} & {*imagenet_resnet.ARCHS}


@pytest.mark.parametrize(
    ("arch", "size"),
    [("googlenet", 64), ("inception_v3", 96), ("vit_b_16", 32), ("maxvit_t", 64), ("swin_t", 64), ("densenet121", 64)],
)
def test_networks_of_every_kind_train_to_one_logit_per_class(arch, size):
    if arch == "maxvit_t":
        with pytest.raises(UsageError, match=r"maxvit_t cannot be built for images of 64 pixels \(.*"):
            imagenet_resnet.build_model(arch, 7, image_size=size)
        size = 224
    with torch.device("meta"):
        model = imagenet_resnet.build_model(arch, 7, image_size=size).train()
        assert model(torch.empty(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize("arch", ["squeezenet1_1", "shufflenet_v2_x0_5"])
def test_other_networks_start_as_torchvisions(arch):
    torch.manual_seed(3)
    expected = torchvision.models.get_model(arch, num_classes=5).state_dict()
    torch.manual_seed(3)
    state = imagenet_resnet.build_model(arch, 5, "fanin").state_dict()
    assert all(torch.equal(state[name], entry) for name, entry in expected.items())
