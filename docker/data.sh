#!/usr/bin/env bash
# data.sh BUCKET: what the nodes of compose.yaml train on; recordings and codec stay in runs/, shards go to the bucket.
set -euo pipefail
bucket=$1
python - "$bucket" <<'PYTHON'
import sys

import boto3

client = boto3.client("s3")
if sys.argv[1] not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
    client.create_bucket(Bucket=sys.argv[1])
PYTHON
out=runs/compose
python -m data_pipeline record configs/games/doom.yaml out=$out/recordings episodes=8 frames=45 seed=0
if ! [ -e $out/codec ]; then
  python -m train codec configs/games/doom.yaml configs/train/demo_codec.yaml steps=10 batch=2 heldout_every=4 \
    source=$out/recordings out=$out/codec
fi
python -m data_pipeline encode configs/games/doom.yaml source=$out/recordings codec=$out/codec heldout_every=4 \
  shard_clips=6 out="s3://$bucket/latents"
