# shellcheck shell=bash
# What the launch scripts share: flags, dry runs, environment files, restarts.
#
# A script sets `flags` to its flags' defaults, where one whose default is `no` is
# a switch, and calls `parse "$@"`.
declare -A flags=()

# How the commands of vlp_jax end: vlp_jax/command.py.
readonly MISTAKE=2 PREEMPTED=75 LOST=69
# How JAX ends a process that misses another one: SIGABRT. How a machine ends
# one when it is taken away: SIGKILL, or SIGTERM where nothing is to be saved.
readonly ABORTED=134 KILLED=137 TERMINATED=143

# Set by a script that was itself told to stop: nothing starts again then.
stopped=no

tell() { printf 'launch: %s\n' "$*" >&2; }

fail() {
  printf 'error: %s\n' "$*" >&2
  exit "$MISTAKE"
}

# Prints the header comment of the script.
usage() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$0" | sed '/^set -/d'; }

# Prints words so that a shell reads them as they are.
quote() {
  local word words=()
  for word in "$@"; do
    [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="${word@Q}"
    words+=("$word")
  done
  printf '%s\n' "${words[*]}"
}

# Prints a command under --dry_run, and runs it otherwise.
run() {
  if [[ "${flags[dry_run]}" == yes ]]; then
    quote "$@"
  else
    "$@"
  fi
}

# Sets `flags`, `words` (what comes before --) and `command` (what comes after).
parse() {
  words=() command=()
  while (($#)); do
    case "$1" in
      --)
        shift
        command=("$@")
        return
        ;;
      --help)
        usage
        exit 0
        ;;
      --*) _set_flag "${1#--}" ;;
      *) words+=("$1") ;;
    esac
    shift
  done
}

_set_flag() {
  local name="${1%%=*}" default
  if [[ ! "$name" =~ ^[a-z_]+$ || ! -v "flags[$name]" ]]; then
    fail "no flag --$name$(_nearest "$name"); --help shows them"
  fi
  default="${flags[$name]}"
  if [[ "$1" == *=* ]]; then
    [[ "$default" != no && "$default" != yes ]] ||
      fail "--$name takes no value"
    flags[$name]="${1#*=}"
  else
    [[ "$default" == no || "$default" == yes ]] ||
      fail "--$name needs a value: --$name=…"
    flags[$name]=yes
  fi
}

# Prints the flag with the longest beginning in common, if there is one.
_nearest() {
  local name best="" length=1 n
  for name in "${!flags[@]}"; do
    for ((n = 0; n < ${#name}; n++)); do
      [[ "${name:n:1}" == "${1:n:1}" ]] || break
    done
    if ((n > length)); then
      best="$name" length="$n"
    fi
  done
  [[ -z "$best" ]] || printf ' (--%s?)' "$best"
}

# Each of these flags must have a value.
need() {
  local name
  for name in "$@"; do
    [[ -n "${flags[$name]}" ]] || fail "set --$name=…; --help says what it is"
  done
}

# Each of these flags must be a whole number.
need_whole() {
  local name
  for name in "$@"; do
    [[ "${flags[$name]}" =~ ^[0-9]+$ ]] ||
      fail "--$name must be a whole number, not \"${flags[$name]}\""
  done
}

need_command() {
  ((${#command[@]})) || fail "no command; it comes after --, as in -- python …"
}

# Sets `settings` to the NAME=VALUE of an environment file.
#
# In the file, NAME=VALUE sets and NAME+=VALUE adds, with a blank between;
# nothing is quoted or expanded. Lines that begin with # are the reasons.
read_env() {
  local line name
  local -A values=()
  local -a names=()
  settings=()
  [[ -r "$1" ]] || fail "cannot read the environment file $1"
  while IFS= read -r line || [[ -n "$line" ]]; do
    [[ -n "$line" && "$line" != \#* ]] || continue
    [[ "$line" =~ ^([A-Za-z_][A-Za-z0-9_]*)(\+?)=(.*)$ ]] ||
      fail "$1 has a line that is not NAME=VALUE: $line"
    name="${BASH_REMATCH[1]}"
    [[ -v "values[$name]" ]] || names+=("$name")
    if [[ -n "${BASH_REMATCH[2]}" && -n "${values[$name]:-}" ]]; then
      values[$name]+=" ${BASH_REMATCH[3]}"
    else
      values[$name]="${BASH_REMATCH[3]}"
    fi
  done <"$1"
  for name in "${names[@]}"; do
    settings+=("$name=${values[$name]}")
  done
}

# Whether a status is that of a loss: of another process, or of the machine.
is_loss() { [[ "$1" =~ ^($LOST|$ABORTED|$KILLED|$TERMINATED)$ ]]; }

# Sets `rank` of a status among those of one run.
#
# A loss comes last: if another process has failed, its status says why.
_rank_of() {
  case "$1" in
    0) rank=0 ;;
    "$PREEMPTED") rank=3 ;;
    "$MISTAKE") rank=4 ;;
    *)
      rank=2
      ! is_loss "$1" || rank=1
      ;;
  esac
}

# Sets `worst` to the worse of it and a status: 2, then 75, then another
# failure, then a loss. Of equals, the first stays.
weigh() {
  local rank before
  _rank_of "$worst"
  before="$rank"
  _rank_of "$1"
  ((rank <= before)) || worst="$1"
}

# Calls a function again while it returns 75 or a loss, --max_restarts times at
# most.
with_restarts() {
  local status restarts=0 why
  while true; do
    status=0
    "$1" || status=$?
    if ((status == PREEMPTED)); then
      why="preempted"
    elif is_loss "$status"; then
      why="a process is lost"
    else
      break
    fi
    if [[ "$stopped" == yes ]]; then
      break
    elif ((restarts >= flags[max_restarts])); then
      tell "$why, and --max_restarts=${flags[max_restarts]} is reached"
      break
    fi
    restarts=$((restarts + 1))
    tell "$why; restart $restarts of at most ${flags[max_restarts]}"
  done
  if ((status == MISTAKE)); then
    tell "stopped: the command says that something must be mended first"
  fi
  return "$status"
}
