
# The head of Ray is the first node, which runs this script too; every node, the first as well, has workers.
# A run that was interrupted and can go on (exit code 75) is put into the queue again: its start is a resume.

refuse() {
  echo "$1" >&2
  exit 2
}

[ -f "$token_file" ] ||
  refuse "$token_file is no file: the Ray token has to be there. To make one: (umask 077 && ray get-auth-token --generate)"
case "$(stat -L -c %a "$token_file")" in
  *00) ;;
  *) refuse "$token_file holds the Ray token and others may use it: chmod 600 $token_file" ;;
esac
[ -x "$environment/bin/dlm" ] || refuse "$environment/bin/dlm is no command: slurm.environment has to hold it on every node"

export PATH="$environment/bin:$PATH" RAY_AUTH_TOKEN_PATH="$token_file"
unset RAY_AUTH_TOKEN # the file counts

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_node="${nodes[0]}"

on_node() { # node, command
  srun --nodes=1 --ntasks=1 --nodelist="$1" "${@:2}"
}
# To itself a node is often 127.0.1.1, so another one is asked for its address; of IPv4, by which ranks of a gang meet.
head_ip="$(on_node "${nodes[-1]}" getent ahostsv4 "$head_node" | awk '$1 !~ /^127\./ { print $1; exit }' || true)"
if [ -z "$head_ip" ]; then
  head_ip="$(on_node "$head_node" hostname --all-ip-addresses | tr ' ' '\n' | grep -m 1 -F . || true)"
fi
[ -n "$head_ip" ] || refuse "$head_node has no IPv4 address, neither by its name (getent ahostsv4) nor of its own (hostname -I)"
export RAY_ADDRESS="$head_ip:6379"

steps=()
start_ray() { # node, options of ray start
  local node="$1"
  shift
  srun --nodes=1 --ntasks=1 --nodelist="$node" --cpus-per-task="$num_cpus" --kill-on-bad-exit=0 \
    ray start "$@" --num-cpus="$num_cpus" --num-gpus="$num_gpus" --memory="$memory_bytes" --labels="$labels" \
    --disable-usage-stats --block &
  steps+=("$!")
}

# shellcheck disable=SC2329 # the trap below calls it
stop_ray() {
  trap '' TERM
  for step in "${steps[@]}"; do kill -TERM "$step" 2>/dev/null || true; done
  # Nothing works there any more, and yet the head has been seen to drain for as long as it may.
  local until_s=$((SECONDS + stop_s))
  while [ -n "$(jobs -pr)" ] && [ "$SECONDS" -lt "$until_s" ]; do sleep 0.2; done
  kill -KILL "${steps[@]}" 2>/dev/null || true
  wait
}
trap stop_ray EXIT

start_ray "$head_node" --head --node-ip-address="$head_ip" --port=6379 --dashboard-host=127.0.0.1
tries=0
until ray health-check --address "$RAY_ADDRESS" >/dev/null 2>&1; do
  tries=$((tries + 1))
  if [ "$tries" -ge "$head_tries" ] || ! kill -0 "${steps[0]}" 2>/dev/null; then
    echo "Ray did not start on $head_node ($RAY_ADDRESS): its output stands above" >&2
    exit 3
  fi
  sleep 1
done
for node in "${nodes[@]:1}"; do
  start_ray "$node" --address="$RAY_ADDRESS"
done
# A training takes what is there: whoever comes later would join at its next start only.
python -m cluster.nodes --wait-for "${#nodes[@]}" --within "$nodes_s" || exit 3

# Slurm sends TERM to this shell alone, in time for a checkpoint: Ray goes on until the driver has ended.
"${command[@]}" &
driver=$!
trap 'told=1; kill -TERM "$driver" 2>/dev/null || true' TERM
while true; do # a signal ends the wait, not the driver
  told=0
  code=0
  wait "$driver" || code=$?
  [ "$told" = 1 ] || break
done

# A run that somebody ended with dlm cancel could go on, but is not wanted to.
# grep reads to the end: with -q it would end early, and dlm fail because nobody reads on.
was_cancelled() { dlm status "${command[3]}" --store "$DLM_STORE" --json | grep '"status": "cancelled"' >/dev/null; }

if [ "$code" = 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$max_requeues" ] && ! was_cancelled; then
  echo "interrupted, and put into the queue again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
