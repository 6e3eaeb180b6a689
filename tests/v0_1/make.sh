# How these folders were made, with 0.1 (252f48a), in an empty folder that has oldnet.py. Pictures and locks were taken out.
set -e
run="onehour train digits --model oldnet:net --base-lr 0.05 --minibatch 1024 --epochs 2 --warmup none --milestones 1 --device cpu --threads 1"
$run --out stopped --log oldnet:Stops || test $? = 75
$run --out finished
onehour sweep digits --base-lr 0.1 --model oldnet:net --minibatch 512,1k --base-minibatch 512 --epochs 1 --warmup none --milestones 1 --seeds 2 --arm none --jobs 1 --device cpu --out sweep
python -c "
import numpy as np; from PIL import Image; from pathlib import Path
for s in ('train', 'val'):
    for c in range(2):
        p = Path('images', s, 'ab'[c]); p.mkdir(parents=True)
        for i in range(3): Image.fromarray(np.random.default_rng(9*c+i).integers(0, 255, (12, 16, 3)).astype(np.uint8)).save(p / f'{i}.png')
"
onehour data pack images pack
