//! What the driver can do, and what a device is asked for.

use libublk_rs_sys as sys;

/// Features of the running driver (`UBLK_U_CMD_GET_FEATURES`, Linux 6.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features(u64);

/// `UBLK_F_*` with their names in words for the log.
const NAMES: [(u32, &str); 16] = [
    (sys::UBLK_F_SUPPORT_ZERO_COPY, "zero_copy"),
    (sys::UBLK_F_URING_CMD_COMP_IN_TASK, "comp_in_task"),
    (sys::UBLK_F_NEED_GET_DATA, "need_get_data"),
    (sys::UBLK_F_USER_RECOVERY, "user_recovery"),
    (sys::UBLK_F_USER_RECOVERY_REISSUE, "user_recovery_reissue"),
    (sys::UBLK_F_UNPRIVILEGED_DEV, "unprivileged_dev"),
    (sys::UBLK_F_CMD_IOCTL_ENCODE, "cmd_ioctl_encode"),
    (sys::UBLK_F_USER_COPY, "user_copy"),
    (sys::UBLK_F_ZONED, "zoned"),
    (sys::UBLK_F_USER_RECOVERY_FAIL_IO, "user_recovery_fail_io"),
    (sys::UBLK_F_UPDATE_SIZE, "update_size"),
    (sys::UBLK_F_AUTO_BUF_REG, "auto_buf_reg"),
    (sys::UBLK_F_QUIESCE, "quiesce"),
    (sys::UBLK_F_PER_IO_DAEMON, "per_io_daemon"),
    (sys::UBLK_F_BUF_REG_OFF_DAEMON, "buf_reg_off_daemon"),
    (sys::UBLK_F_BATCH_IO, "batch_io"),
];

impl Features {
    /// As the driver reports them.
    pub fn new(bits: u64) -> Self {
        Self(bits)
    }

    /// Of a driver that takes our commands but is too old to report its features: Linux 6.4.
    pub fn unreported() -> Self {
        let recovery = sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE;
        Self(u64::from(recovery | sys::UBLK_F_UNPRIVILEGED_DEV | sys::UBLK_F_CMD_IOCTL_ENCODE))
    }

    fn has(self, flag: u32) -> bool {
        self.0 & u64::from(flag) != 0
    }

    /// Data of requests is copied by reads and writes of /dev/ublkcN, into any buffer (Linux 6.5). Without it every
    /// tag needs a buffer of the largest request of its own.
    pub fn user_copy(self) -> bool {
        self.has(sys::UBLK_F_USER_COPY)
    }

    /// A device outlives a crash of its server, and requests in flight are issued again to the next one (Linux 6.1).
    pub fn recovery(self) -> bool {
        self.has(sys::UBLK_F_USER_RECOVERY) && self.has(sys::UBLK_F_USER_RECOVERY_REISSUE)
    }

    /// Devices without CAP_SYS_ADMIN (Linux 6.3).
    pub fn unprivileged(self) -> bool {
        self.has(sys::UBLK_F_UNPRIVILEGED_DEV)
    }

    /// The size of a live device can change (Linux 6.16).
    pub fn update_size(self) -> bool {
        self.has(sys::UBLK_F_UPDATE_SIZE)
    }
}

impl std::fmt::Display for Features {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut names = NAMES.iter().filter(|(flag, _)| self.has(*flag)).map(|(_, name)| *name);
        f.write_str(names.next().unwrap_or("none"))?;
        names.try_for_each(|name| write!(f, " {name}"))
    }
}

/// Flags of one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceFlags {
    /// See [`Features::user_copy`].
    pub user_copy: bool,
    /// See [`Features::recovery`].
    pub recovery: bool,
    /// See [`Features::unprivileged`].
    pub unprivileged: bool,
    /// See [`Features::update_size`].
    pub update_size: bool,
}

impl DeviceFlags {
    /// The best that `features` allow to a `privileged` process or another one. The kernel allows neither user copy
    /// nor recovery on unprivileged devices.
    pub fn choose(features: Features, privileged: bool, user_copy: bool) -> Self {
        Self {
            user_copy: user_copy && privileged && features.user_copy(),
            recovery: privileged && features.recovery(),
            unprivileged: !privileged,
            update_size: features.update_size(),
        }
    }

    /// As in [`crate::DevInfo::flags`].
    pub fn bits(self) -> u64 {
        let flag = |on: bool, bits: u32| if on { u64::from(bits) } else { 0 };
        flag(self.user_copy, sys::UBLK_F_USER_COPY)
            | flag(self.recovery, sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE)
            | flag(self.unprivileged, sys::UBLK_F_UNPRIVILEGED_DEV)
            | flag(self.update_size, sys::UBLK_F_UPDATE_SIZE)
            | u64::from(sys::UBLK_F_CMD_IOCTL_ENCODE)
    }

    /// Of a device that is there.
    ///
    /// # Errors
    /// What this crate cannot serve, in words.
    pub fn of_device(bits: u64) -> Result<Self, &'static str> {
        let features = Features(bits);
        if features.has(sys::UBLK_F_ZONED) {
            return Err("it is a zoned device");
        }
        if features.has(sys::UBLK_F_SUPPORT_ZERO_COPY) || features.has(sys::UBLK_F_AUTO_BUF_REG) {
            return Err("it was made for zero copy");
        }
        if features.has(sys::UBLK_F_BATCH_IO) {
            return Err("it was made for batched commands");
        }
        if features.has(sys::UBLK_F_NEED_GET_DATA) && !features.user_copy() {
            return Err("it was made for GET_DATA commands");
        }
        Ok(Self {
            user_copy: features.user_copy(),
            // Requests of the crashed server may also have failed instead of being issued again: that was its choice.
            recovery: features.has(sys::UBLK_F_USER_RECOVERY),
            unprivileged: features.unprivileged(),
            update_size: features.update_size(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Linux 6.12 reports.
    const LINUX_6_12: u64 = 0x1fe;

    #[test]
    fn the_driver_of_6_12_in_words() {
        let features = Features::new(LINUX_6_12);
        assert!(features.user_copy() && features.recovery() && features.unprivileged());
        assert!(!features.update_size());
        assert_eq!(
            features.to_string(),
            "comp_in_task need_get_data user_recovery user_recovery_reissue unprivileged_dev cmd_ioctl_encode \
             user_copy zoned"
        );
        assert_eq!(Features::new(0).to_string(), "none");
    }

    #[test]
    fn flags_fall_back() {
        let all = Features::new(LINUX_6_12);
        let best = DeviceFlags::choose(all, true, true);
        assert!(best.user_copy && best.recovery && !best.unprivileged && !best.update_size);
        assert_eq!(DeviceFlags::of_device(best.bits()), Ok(best));
        let plain = DeviceFlags::choose(all, true, false);
        assert!(!plain.user_copy && plain.recovery);
        let user = DeviceFlags::choose(all, false, true);
        assert!(!user.user_copy && !user.recovery && user.unprivileged);
        let old = DeviceFlags::choose(Features::unreported(), true, true);
        assert!(!old.user_copy && old.recovery);
        assert!(!DeviceFlags::choose(Features::new(0), true, true).recovery);
    }

    #[test]
    fn foreign_devices_are_refused_in_words() {
        for flag in [sys::UBLK_F_ZONED, sys::UBLK_F_SUPPORT_ZERO_COPY, sys::UBLK_F_NEED_GET_DATA] {
            assert!(DeviceFlags::of_device(u64::from(flag)).is_err());
        }
    }
}
