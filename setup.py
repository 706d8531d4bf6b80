"""The one thing that setup.cfg cannot say: ``mace_peft.pth`` goes beside the packages."""

from setuptools import Distribution, setup  # isort: skip  (brings along the distutils that Python 3.12 dropped)
from distutils.command.install_data import install_data


class InstallBesidePackages(install_data):
    """Installs ``data_files`` into site-packages instead of the environment's root.

    Wheels and editable wheels both run this command and record what it writes. ``build_py``, the other place for a
    ``.pth`` file, would serve wheels only: an editable install ignores the files that it builds.
    """

    def finalize_options(self):
        self.set_undefined_options("install", ("install_lib", "install_dir"))
        super().finalize_options()


class DistributionWithData(Distribution):
    """Says that it has data files under the name by which setuptools' editable install asks, too."""

    has_data = Distribution.has_data_files


setup(distclass=DistributionWithData, cmdclass={"install_data": InstallBesidePackages})
