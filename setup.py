"Packaging for diffnb: everything is read from settings.ini, so that nbdev and pip agree."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
spdx = {'apache2':'Apache-2.0', 'mit':'MIT', 'bsd3':'BSD-3-Clause'}
py_versions = [f'3.{o}' for o in range(11, 15)]
statuses = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature', '7 - Inactive']

def words(key): return cfg.get(key, '').split()

# every `NAME_requirements` of settings.ini is an extra; `all` is what any machine can install: not `dev`, nor `gpu`, which needs CUDA
tail = '_requirements'
extras = {k.removesuffix(tail): words(k) for k in cfg if k.endswith(tail)}
extras['all'] = sorted({o for k,v in extras.items() if k not in ('dev', 'gpu') for o in v})

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    url=cfg['git_url'],
    author=cfg['author'],
    author_email=cfg['author_email'],
    license=spdx[cfg['license']],
    keywords=cfg['keywords'],
    classifiers=[
        f"Development Status :: {statuses[int(cfg['status'])-1]}",
        f"Intended Audience :: {cfg['audience'].title()}",
        f"Natural Language :: {cfg['language'].title()}",
        'Programming Language :: Python :: 3',
        *[f'Programming Language :: Python :: {o}' for o in py_versions
          if tuple(map(int, o.split('.'))) >= tuple(map(int, cfg['min_python'].split('.')))],
    ],
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path']+'.*']),
    package_data={cfg['lib_path']: ['datasets/*', 'recipes/*', 'trained/**/*']},
    include_package_data=True,
    python_requires=f">={cfg['min_python']}",
    install_requires=words('requirements'),
    extras_require=extras,
    entry_points={
        'console_scripts': words('console_scripts'),
        'nbdev': [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
