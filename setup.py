from setuptools import find_namespace_packages, setup

# tav_opt/kernels and tav_opt/export are namespace packages: a link to one of them from the root must not make an
# importable top-level package that shadows the PyPI package `kernels`, which transformers imports.
setup(packages=find_namespace_packages(include=["tav_opt", "tav_opt.*"], exclude=["tav_opt.demo.*"]))
