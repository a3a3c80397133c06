//! Job files, in the form and with the words of fio's: sections of `key=value` lines, `[global]` for all that follow.
//!
//! ```text
//! [global]
//! bs=4k
//! iodepth=32
//! [reader]
//! filename=Malloc0
//! rw=randread
//! [writer]
//! filename=nbd://192.0.2.1/disk0
//! rw=randwrite
//! rate_iops=10000
//! cpus=0x2
//! ```

use super::options::Job;
use super::units;

const KEYS: &str = "filename, rw, bs, iodepth, rwmixread, offset, size, rate_iops, cpus";
/// A file beyond this is none that somebody wrote.
const MAX_JOBS: usize = 1024;

/// The jobs of a file, each beginning as `default`, which is what the command line says.
///
/// # Errors
/// With the number of the line.
pub fn parse(text: &str, default: &Job) -> Result<Vec<Job>, String> {
    let (mut global, mut jobs) = (default.clone(), Vec::new());
    // None before the first section.
    let mut current: Option<Job> = None;
    let mut in_global = false;
    for (n, line) in text.lines().enumerate() {
        let at = |e: String| format!("line {}: {e}", n + 1);
        let line = line.trim();
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(name) = line.strip_prefix('[') {
            let name = name.strip_suffix(']').ok_or_else(|| at(format!("'{line}': write [name]")))?;
            jobs.extend(current.take());
            if jobs.len() >= MAX_JOBS {
                return Err(at(format!("more than {MAX_JOBS} jobs")));
            }
            in_global = name == "global";
            current = (!in_global).then(|| Job { name: name.into(), ..global.clone() });
            continue;
        }
        let job = match &mut current {
            Some(job) => job,
            None if in_global => &mut global,
            None => return Err(at("before the first section: begin with [global] or [name]".into())),
        };
        let (key, value) = line
            .split_once('=')
            .ok_or_else(|| at(format!("'{line}': write key=value; the keys are {KEYS}")))?;
        set(job, key.trim(), value.trim()).map_err(at)?;
    }
    jobs.extend(current);
    if jobs.is_empty() {
        return Err("there is no job in it: write a section [name] with filename=BDEV".into());
    }
    Ok(jobs)
}

fn set(job: &mut Job, key: &str, value: &str) -> Result<(), String> {
    let number = |what: &str| format!("{key}={value}: use {what}");
    match key {
        "filename" => job.target = value.parse()?,
        "rw" => job.workload = value.parse()?,
        "bs" => job.block_size = units::size(value)?.try_into().map_err(|_| number("less than 4 GiB"))?,
        "iodepth" => job.queue_depth = value.parse().map_err(|_| number("a number"))?,
        "rwmixread" => job.read_percent = value.parse().map_err(|_| number("a percentage"))?,
        "offset" => job.offset = units::size(value)?,
        "size" => job.size = units::size(value)?,
        "rate_iops" => job.rate_iops = Some(value.parse().map_err(|_| number("requests per second"))?),
        "cpus" => job.cores = Some(value.parse().map_err(|e| format!("cpus={value}: {e}"))?),
        _ => return Err(format!("{key}=: no such key; there are {KEYS}")),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::options::Workload;
    use super::super::target::Target;
    use super::*;

    fn default() -> Job {
        Job {
            name: String::new(),
            target: Target::Bdev(String::new()),
            workload: Workload::RandRead,
            block_size: 4096,
            queue_depth: 1,
            read_percent: 50,
            offset: 0,
            size: 0,
            rate_iops: None,
            cores: None,
        }
    }

    #[test]
    fn sections_and_their_order() {
        let text = "# two\n[global]\nbs=8k\n[a]\nfilename=Null0\n\n[b]\nfilename = vhost:/s\nrw=randrw\nrwmixread=70\n\
                    rate_iops=1e3\ncpus=[1]\nsize=1G\noffset=16k\niodepth=4";
        let jobs = parse(text, &default()).unwrap();
        assert_eq!(jobs.len(), 2);
        assert_eq!(
            (jobs[0].name.as_str(), jobs[0].block_size, jobs[0].workload),
            ("a", 8192, Workload::RandRead)
        );
        let b = &jobs[1];
        assert_eq!((b.workload, b.read_percent, b.rate_iops), (Workload::RandRw, 70, Some(1000.0)));
        assert_eq!((b.size, b.offset, b.queue_depth), (1 << 30, 16384, 4));
        assert_eq!(b.cores.as_ref().map(|c| c.cores().to_vec()), Some(vec![1]));
    }

    #[test]
    fn mistakes_have_a_line() {
        for (text, says) in [
            ("bs=4k", "line 1: before the first section"),
            ("[a]\nbs", "line 2: 'bs': write key=value"),
            ("[a]\n\nbs=x", "line 3: 'x' is no size"),
            ("[a]\nspeed=9", "line 2: speed=: no such key"),
            ("[a\n", "line 1: '[a': write [name]"),
            ("[global]\nbs=4k", "no job"),
            ("[a]\nrw=fast", "line 2: workload 'fast'"),
            ("[a]\ncpus=x", "line 2: cpus=x"),
        ] {
            let e = parse(text, &default()).unwrap_err();
            assert!(e.contains(says), "{text}: {e}");
        }
    }
}
