# What the batch scripts of this folder share: start a command on every rank of the job, and act on its exit code.
#
#   source launch/slurm/ranks.sh launch/NAME.py ARGUMENT ...
#
# PYTHON  the interpreter, on a disk that all nodes see
# LOGS    folder for what each rank prints; what a run logs is in run.dir/logs
set -u -o pipefail
PYTHON=${PYTHON:-.venv/bin/python}  # SITE: `module load` lines belong here
LOGS=${LOGS:-slurm-$SLURM_JOB_ID}

say() { echo "$(date '+%F %T') job $SLURM_JOB_ID: $*"; }

if [ ! -e "$1" ] || ! command -v "$PYTHON" >/dev/null; then
  say "no $PYTHON or no $1 in $PWD: submit from the root of the repository, or set PYTHON to the interpreter"
  exit 2
fi

# The address at which Slurm itself reaches the first node. SITE: NCCL_SOCKET_IFNAME, where NCCL takes a slow interface.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT
export WORLD_SIZE=$SLURM_NTASKS
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

mkdir -p "$LOGS"
trap 'say "asked to stop"' TERM USR1
say "start $((${SLURM_RESTART_COUNT:-0} + 1)): $WORLD_SIZE ranks on $SLURM_JOB_NODELIST; what they print is in $LOGS"

# A process for each rank without torchrun between: signals reach it, and its own exit code comes back. When one has
# ended, the others have --wait seconds to say what they know of it and to end too.
srun --wait=120 --kill-on-bad-exit=0 --open-mode=append --output="$LOGS/rank%t.log" \
  bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"' rank "$PYTHON" "$@"
code=$?

case $code in
0)
  say "done"
  ;;
2)
  say "a wrong recipe, input or launch; not started again"
  grep --no-filename '^error: ' "$LOGS"/rank*.log | sort -u
  ;;
75)
  say "stopped with everything saved; back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
  ;;
*)
  say "FAILED, exit code $code; the same sbatch command continues from what was saved last"
  grep --no-filename '| ERROR ' "$LOGS"/rank*.log | tail -n 3
  say "the ranks' last lines:"
  tail -n 3 "$LOGS"/rank*.log
  ;;
esac
exit "$code"
