#!/bin/busybox sh
# shellcheck shell=dash disable=SC2013
# Init of the bench's guest: mounts the host's root (9p, read-only, with a tmpfs on top) and the job folder that
# run.sh prepared (9p, writable), and runs the job in a chroot there, so that every program of the host is at hand.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
ln -s /proc/self/fd /dev/fd
for n in 0:stdin 1:stdout 2:stderr; do ln -s "/proc/self/fd/${n%:*}" "/dev/${n#*:}"; done
mount -t tmpfs shm /dev/shm
# All CPUs but the first, see run.sh.
for c in /sys/devices/system/cpu/cpu[1-9]*/online; do echo 1 >"$c"; done
for m in $(cat /modules/order); do insmod "/modules/$m" || echo "init: insmod $m failed" >/dev/kmsg; done

die() {
  echo "init: $*" >/dev/kmsg
  poweroff -f
}
opts=trans=virtio,version=9p2000.L,msize=512000
mount -t 9p -o $opts,ro,cache=loose host /lower || die "the host's root did not mount"
mount -t tmpfs -o size=75% upper /upper
mkdir -p /upper/data /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work overlay /host || die "overlay failed"
for d in proc sys dev; do mount --rbind /$d /host/$d; done
mount -t tmpfs run /host/run
mkdir -p /host/run/job
mount -t 9p -o $opts,rw,cache=none job /host/run/job || die "the job folder did not mount"
# The kernel starts its module loader outside of the chroot.
printf '#!/bin/sh\nexec /bin/chroot /host /sbin/modprobe "$@"\n' >/bin/load-module
chmod +x /bin/load-module
echo /bin/load-module >/proc/sys/kernel/modprobe
ip link set lo up
hostname vm

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb
chroot /host /bin/bash /run/job/main.sh </dev/null >/dev/hvc0 2>&1
echo $? >/host/run/job/status
sync
poweroff -f
