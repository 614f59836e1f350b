"""The files of Stable Diffusion v1 as published, by the SHA-256 that model pages and lists give for them."""

from __future__ import annotations

from collections.abc import Mapping

PUBLISHED: Mapping[str, str] = {
    "86cd1d3ccb044d7ba8db743d717c9bac603c4043508ad2571383f954390f3cea": "sd-v1-1.ckpt",
    "efdeb5dc418a025d9a8cc0a8617e106c69044bc2925abecc8a254b2910d69829": "sd-v1-1-full-ema.ckpt",
    "3b87d30facd5bafca1cbed71cfb86648aad75d1c264663c0cc78c7aea8daec0d": "sd-v1-2.ckpt",
    "bc5086a904d7b9d13d2a7bccf38f089824755be7261c7399d92e555e1e9ac69a": "sd-v1-2-full-ema.ckpt",
    "2cff93af4dcc07c3e03110205988ff98481e86539c51a8098d4f2236e41f7f2f": "sd-v1-3.ckpt",
    "54632c6e8a36eecae65e36cb0595fab314e1a1545a65209f24fde221a8d4b2ca": "sd-v1-3-full-ema.ckpt",
    "fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556": "sd-v1-4.ckpt",
    "14749efc0ae8ef0329391ad4436feb781b402f4fece4883c7ad8d10556d8a36a": "sd-v1-4-full-ema.ckpt",
    "cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516": "v1-5-pruned-emaonly.ckpt",
    "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa": "v1-5-pruned-emaonly.safetensors",
    "e1441589a6f3c5a53f5f54d0975a18a7feb7cdf0b0dee276dfc3331ae376a053": "v1-5-pruned.ckpt",
    "1a189f0be69d6106a48548e7626207dddd7042a418dbf372cefd05e0cdba61b6": "v1-5-pruned.safetensors",
    "c6bbc15e3224e6973459ba78de4998b80b50112b0ae5b5c67113d56b4e366b19": "sd-v1-5-inpainting.ckpt",
}
