# The network between the kernel client and the server's side, and RDMA on it. Sourced by lib.sh.
# shellcheck shell=bash
#
# VM_NET (run.sh -n) says where the server's side is:
#   rxe   in the guest's only network namespace, on rxe devices: the target uses rdma-core (setup_rxe)
#   soft  in another network namespace of the guest, without any RDMA device: the target uses soft-roce
#   tap   on the host, in a network namespace that run.sh makes, behind TAP devices: soft-roce as well
# VM_MTU (run.sh -o) is the links' MTU, 9000 unless set. VM_NETEM: arguments of `tc qdisc … netem` for both directions of
# every link; VM_LOSSY=yes stands for lost and overtaking packets.
#
# A scenario that puts load on the kernel client sets VM_SPARE_REQUESTS=yes before setup_net: then the client's requests
# and the acknowledgements of them get through, and VM_NETEM is for all else: the server's requests, which carry all data
# that the client reads and all answers, the client's acknowledgements, and connection management. For rxe does not
# survive going back to a request behind which memory has been registered: it executes IB_WR_REG_MR again
# (`rxe_req.c`: `rxe_requester`), which fails ("rxe_reg_fast_mr: not free") and breaks the queue pair. With the kernel's
# own server it is the same, or worse: that registers memory, too.

VM_NET=${VM_NET:-rxe}
VM_MTU=${VM_MTU:-9000}
[[ -z ${VM_LOSSY:-} ]] || VM_NETEM="delay 1ms reorder 25% 50% loss 1%"

# server_addr I, client_addr I: the two addresses of link I (from 1). path_spec I...: the rtrs paths over these links.
server_addr() { echo "10.9.$1.1"; }
client_addr() { echo "10.9.$1.2"; }
path_spec() {
  local i
  for i in "$@"; do printf 'path=ip:%s@ip:%s ' "$(client_addr "$i")" "$(server_addr "$i")"; done
}

# Ends of link I: interface names on the server's and on the client's side.
_server_if() { case $VM_NET in tap) echo "tap$(($1 - 1))" ;; *) echo "d$((2 * $1 - 2))" ;; esac; }
_client_if() { case $VM_NET in tap) echo "eth$(($1 - 1))" ;; *) echo "d$((2 * $1 - 1))" ;; esac; }

# setup_net [N]: N links (with tap at most 2), with an rxe device rxe1, rxe3, … on every client's end, and what VM_NET says
# on the server's.
setup_net() {
  _keep_ingress
  case $VM_NET in
    rxe) setup_rxe "$@" ;;
    soft) _setup_soft "$@" ;;
    tap) _setup_tap "$@" ;;
    *) die "VM_NET: no network named \"$VM_NET\"; there are rxe, soft, tap" ;;
  esac
  [[ $VM_NET == rxe ]] || _meet_neighbours "${1:-1}"
  [[ -z ${VM_NETEM:-} ]] || _setup_netem "${1:-1}"
}

# The prefix of commands that run on the server's side, as words. SWAP_ENDS=yes (after setup_net) swaps the sides of
# programs: see initiator.sh.
_server_prefix() { [[ $VM_NET != soft || -n ${SWAP_ENDS:-} ]] || echo ip netns exec server; }

# on_server SCRIPT [ARGUMENT...]: runs a shell script on the server's side; its output and status are the script's. The first
# ARGUMENT is $0 there.
on_server() {
  if [[ $VM_NET == tap ]]; then
    _on_host "$@"
  else
    # shellcheck disable=SC2046 # a list of words
    $(_server_prefix) bash -c "$@"
  fi
}

# run.sh takes scripts from this folder and answers beside them.
_on_host() {
  local ask rc
  ask=$(mktemp /run/job/host/ask.XXXXXX)
  {
    [[ $# -lt 3 ]] || printf 'set -- %s\n' "${*:3}"
    printf '%s\n' "$1"
  } >"$ask"
  mv "$ask" "$ask.sh"
  until [[ -s $ask.rc ]]; do sleep 0.02; done
  rc=$(cat "$ask.rc")
  cat "$ask.out"
  cat "$ask.err" >&2
  rm -f "$ask".*
  return "$rc"
}

_rdma_modules() { must modprobe -a veth rdma_rxe rdma_ucm ib_uverbs; }

_setup_soft() {
  local n=${1:-1} i s c
  _rdma_modules
  sysctl -qw net.ipv6.conf.default.disable_ipv6=1 net.core.netdev_max_backlog=65536
  must ip netns add server
  must ip -n server link set lo up
  for ((i = 1; i <= n; i++)); do
    s=$(_server_if "$i") c=$(_client_if "$i")
    must ip link add "$s" type veth peer name "$c"
    must ip link set "$s" netns server
    must ip -n server addr add "$(server_addr "$i")/24" dev "$s"
    must ip -n server link set "$s" mtu "$VM_MTU" up
    # One CPU receives: else packets that were sent one after the other by different CPUs overtake each other.
    must on_server "echo 1 >/sys/class/net/$s/queues/rx-0/rps_cpus"
    must ip addr add "$(client_addr "$i")/24" dev "$c"
    must ip link set "$c" mtu "$VM_MTU" up
    must rdma link add "rxe$((2 * i - 1))" type rxe netdev "$c"
  done
}

_setup_tap() {
  local n=${1:-1} i c
  _rdma_modules
  must modprobe virtio_net
  sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.core.netdev_max_backlog=65536
  for ((i = 1; i <= n; i++)); do
    c=$(_client_if "$i")
    must on_server "ip addr add $(server_addr "$i")/24 dev $(_server_if "$i") && ip link set $(_server_if "$i") mtu $VM_MTU up"
    must ip addr add "$(client_addr "$i")/24" dev "$c"
    must ip link set "$c" mtu "$VM_MTU" up
    must rdma link add "rxe$((2 * i - 1))" type rxe netdev "$c"
  done
}

# The first packets of a link resolve its neighbours. The RDMA connection manager of Linux waits for a neighbour until
# its time is over (30 s for RTRS) if the answer comes at once, as over veth: before its request is in the list that is
# looked at then (`addr.c`: `rdma_resolve_ip`, `netevent_callback`). And rxe's neighbour stays: while a link is cut it could
# not be asked again, and a send without one leaves rxe's QP 1 in the error state for good (see cut_path).
_meet_neighbours() {
  local i c address mac
  for ((i = 1; i <= $1; i++)); do
    address=$(server_addr "$i") c=$(_client_if "$i")
    must ping -q -c 1 -W 10 "$address" >/dev/null
    mac=$(ip neigh show "$address" dev "$c" | sed -n 's/.*lladdr \([^ ]*\).*/\1/p')
    must ip neigh replace "$address" dev "$c" lladdr "$mac" nud permanent
  done
}

# _setup_netem N: VM_NETEM on links 1…N.
_setup_netem() {
  local i
  modprobe sch_netem 2>/dev/null
  for ((i = 1; i <= $1; i++)); do
    # What the target hands to its system as a run of packets is lost packet by packet.
    [[ $VM_NET != soft ]] || must on_server "ip link set $(_server_if "$i") gso_max_segs 1"
    _disturb "$i"
  done
}

# _disturb I: VM_NETEM on both directions of link I, but not on what VM_SPARE_REQUESTS spares.
_disturb() {
  _netem "$1" "$VM_NETEM"
  if [[ ${VM_SPARE_REQUESTS:-no} == yes ]]; then
    _netem_for "$(_client_if "$1")" only $BTH_ACKNOWLEDGE $BTH_DATAGRAM
    _netem_for "ifb$(($1 - 1))" except $BTH_ACKNOWLEDGE
  fi
}

# disturb_requests I: from now on VM_NETEM is for all that goes over link I. spare_requests I: as before again.
disturb_requests() { _netem "$1" "$VM_NETEM"; }
spare_requests() { _disturb "$1"; }

# The first byte of RoCE packets: opcodes.
BTH_ACKNOWLEDGE=0x11 BTH_DATAGRAM=0x64

# _netem_for DEVICE only|except OPCODE...: VM_NETEM for some of what DEVICE sends.
_netem_for() {
  local device=$1 others=1 these=2 opcode
  [[ $2 == only ]] || others=2 these=1
  shift 2
  must modprobe -a sch_prio cls_u32
  must tc qdisc del dev "$device" root
  # shellcheck disable=SC2046 # a list of words
  must tc qdisc add dev "$device" root handle 1: prio bands 2 priomap $(printf "$((others - 1)) %.0s" {1..16})
  # shellcheck disable=SC2086 # a list of words
  must tc qdisc add dev "$device" parent 1:2 netem $VM_NETEM
  for opcode in "$@"; do
    must tc filter add dev "$device" parent 1: protocol ip u32 match ip protocol 17 0xff match ip dport 4791 0xffff \
      match u8 "$opcode" 0xff at 28 flowid "1:$these"
  done
}

# _netem I ARGUMENTS: for both directions of link I, at the client's end: what comes in passes an ifb device.
_netem() {
  _ingress_device "$1"
  # shellcheck disable=SC2086 # a list of words
  must tc qdisc replace dev "$(_client_if "$1")" root netem $2
  # shellcheck disable=SC2086
  must tc qdisc replace dev "ifb$(($1 - 1))" root netem $2
}
_no_netem() {
  must tc qdisc del dev "$(_client_if "$1")" root
  must tc qdisc del dev "$(_client_if "$1")" ingress
}
# The first ingress queue of a kernel patches its code, and the removal of the last one patches it back. Under packets an
# emulator with several CPUs does not always survive that (an int3 that nobody knows). So one stays, where nothing passes.
_keep_ingress() {
  modprobe sch_ingress 2>/dev/null
  tc qdisc show dev lo | grep -q ingress || must tc qdisc add dev lo ingress
}
_ingress_device() {
  local ifb=ifb$(($1 - 1))
  ! tc qdisc show dev "$(_client_if "$1")" | grep -q ingress || return 0
  must modprobe -a ifb sch_ingress act_mirred cls_matchall
  [[ -e /sys/class/net/$ifb ]] || must ip link add "$ifb" type ifb
  must ip link set "$ifb" mtu 9000 txqueuelen 1000 up
  must tc qdisc add dev "$(_client_if "$1")" ingress
  must tc filter add dev "$(_client_if "$1")" ingress matchall action mirred egress redirect dev "$ifb"
}

# setup_rxe [N]: N independent links, each a veth pair with an rxe device on both ends: server side d0, d2, … with
# 10.9.1.1, 10.9.2.1, … and rxe0, rxe2, …; client side d1, d3, … with 10.9.1.2, 10.9.2.2, … and rxe1, rxe3, ….
#
# Kernel RTRS knows only the first network namespace, where Linux would deliver packets between two own addresses
# through lo, past rxe. So the local table is consulted after a table that sends what this host itself makes (iif lo)
# for 10.9.I.x out by the opposite end of the pair; packets that arrive find their address in the local table.
setup_rxe() {
  local n=${1:-1} i s c
  _rdma_modules
  sysctl -qw net.ipv4.conf.{all,default}.rp_filter=0 net.ipv4.conf.{all,default}.accept_local=1 \
    net.ipv4.conf.all.arp_ignore=1 net.ipv4.conf.all.arp_announce=2 net.ipv6.conf.default.disable_ipv6=1
  # A burst of large requests must not overrun the queue between the ends of a pair: rxe answers a lost packet by executing
  # local requests behind it again, which on 6.1 can leave a queue pair stuck ("rxe_reg_fast_mr: … not free").
  sysctl -qw net.core.netdev_max_backlog=65536
  ip rule add pref 10 iif lo to 10.9.0.0/16 lookup 100
  ip rule add pref 20 lookup local
  ip rule del pref 0
  for ((i = 1; i <= n; i++)); do
    s=d$((2 * i - 2)) c=d$((2 * i - 1))
    must ip link add "$s" type veth peer name "$c"
    must ip addr add "$(server_addr "$i")/24" dev "$s"
    must ip addr add "$(client_addr "$i")/24" dev "$c"
    must ip link set "$s" mtu "$VM_MTU" up
    must ip link set "$c" mtu "$VM_MTU" up
    _route_link "$i"
    must rdma link add "rxe$((2 * i - 2))" type rxe netdev "$s"
    must rdma link add "rxe$((2 * i - 1))" type rxe netdev "$c"
  done
}

# Neighbours are permanent, as an RDMA connection request does not outlive the first ARP exchange in this topology.
_route_link() {
  local i=$1 s=d$((2 * $1 - 2)) c=d$((2 * $1 - 1))
  must ip neigh replace "$(server_addr "$i")" dev "$c" lladdr "$(cat "/sys/class/net/$s/address")" nud permanent
  must ip neigh replace "$(client_addr "$i")" dev "$s" lladdr "$(cat "/sys/class/net/$c/address")" nud permanent
  must ip route replace "$(server_addr "$i")/32" dev "$c" src "$(client_addr "$i")" table 100
  must ip route replace "$(client_addr "$i")/32" dev "$s" src "$(server_addr "$i")" table 100
}

# cut_path I [HOW], heal_path I [HOW]: breaks link I for both ends, and repairs it. HOW:
#   loss (default)  every packet vanishes and nobody is told, as behind a dead switch. Under load both ends see the path
#                   dead in 1-2 s, by exhausted retransmissions; idle, by missed heartbeats in about 30 s. The kernel's
#                   server may keep the old path until its heartbeat fails, and refuses the client's return until then.
#   down            both ends lose carrier and see a port error at once. Not to be healed: rxe's QP 1 goes to the error
#                   state for good when a send finds no route (so does a packet filter that drops at output), and
#                   without it no connection can be made over that device any more.
#   host            tap only: the host's interface goes down, and rxe's end is told nothing. For rnbd-initiator on the host
#                   with the kernel's server: a queue that loses everything at rxe's own device leaves rxe's QP 1 in the
#                   error state when that server closes its side of the path.
cut_path() {
  local i=$1 how=${2:-loss}
  case $how in
    loss)
      modprobe sch_netem 2>/dev/null
      if [[ $VM_NET == soft ]]; then _far_end "$i" 100% drop; else _netem "$i" "loss 100%"; fi
      ;;
    down)
      must ip link set "$(_client_if "$i")" down
      must on_server "ip link set $(_server_if "$i") down"
      ;;
    host) must on_server "ip link set $(_server_if "$i") down" ;;
    *) die "cut_path: no way to cut named \"$how\"" ;;
  esac
}
heal_path() {
  if [[ ${2:-} == host ]]; then
    must on_server "ip link set $(_server_if "$1") up"
    return
  fi
  if [[ $VM_NET == soft ]]; then
    _far_end "$1" 0% pass
    return
  fi
  if [[ -n ${VM_NETEM:-} ]]; then
    _disturb "$1"
    return
  fi
  _no_netem "$1"
}
# _far_end I LOSS ACTION: with soft-roce on one end the link is cut there. A queue that loses everything at rxe's own device
# now and then left rxe's QP 1 in the error state as well, when the kernel's server closed its side of the path. Nothing is
# taken away again: that patches the kernel's code, which an emulator with several CPUs does not always survive.
_far_end() {
  local i=$1 d
  d=$(_server_if "$i")
  must tc -n server qdisc replace dev "$d" root netem limit 100000 loss "$2"
  if ! tc -n server qdisc show dev "$d" | grep -q ingress; then
    modprobe -a sch_ingress act_gact cls_matchall
    must tc -n server qdisc add dev "$d" ingress
    must tc -n server actions add action pass index "$i"
    must tc -n server filter add dev "$d" ingress matchall action gact index "$i"
  fi
  must tc -n server actions change action "$3" index "$i"
}
