//! Jobs by events and commands.

use super::core::{Command, End, ErrorType, JobsState, Limits, ProcessId, Refused, Status};
use super::request::Submission;
use heliostat_runtime::spec::Resources;

const KEEPER: ProcessId = ProcessId { pid: 7, start_time: 1 };

fn state(running_max: usize) -> JobsState {
    JobsState::new(Limits { running_max, queued_max: 2, kept_max: 2 }, Vec::new())
}

fn job() -> Submission {
    Submission::of("true")
}

/// One that asks for something of its node.
fn greedy() -> Submission {
    Submission { resources: Resources::cpus(1), ..job() }
}

fn message(jobs: &JobsState, id: &str) -> String {
    jobs.get(id).and_then(|job| job.message.clone()).unwrap_or_default()
}

fn save(id: &str) -> Command {
    Command::Save(id.into())
}

fn start(id: &str) -> Command {
    Command::Start(id.into())
}

#[test]
fn a_job_runs_and_succeeds() {
    let mut jobs = state(1);
    assert_eq!(jobs.submit("a", job(), 5), Ok(vec![save("a"), start("a")]));
    assert_eq!(jobs.get("a").map(|job| job.status), Some(Status::Pending));
    assert_eq!(jobs.started("a", KEEPER), [save("a")]);
    assert_eq!(jobs.get("a").map(|job| job.status), Some(Status::Running));
    assert_eq!(jobs.ended("a", End::Exited { code: 0 }, "", 9), [save("a")]);
    let job = jobs.get("a").expect("kept");
    assert_eq!((job.status, job.exit_code, job.end_time), (Status::Succeeded, Some(0), Some(9)));
    assert_eq!(jobs.submit("a", super::request::Submission::of("true"), 9), Err(Refused::Exists("a".into())));
}

#[test]
fn a_failure_names_code_and_log() {
    let mut jobs = state(2);
    for (id, tail) in [("a", "boom\n"), ("b", "")] {
        jobs.submit(id, job(), 0).expect("taken");
        jobs.started(id, KEEPER);
        jobs.ended(id, End::Exited { code: 3 }, tail, 1);
    }
    let message = |id| jobs.get(id).and_then(|job| job.message.clone()).expect("a message");
    assert_eq!(
        message("a"),
        "Job entrypoint command failed with exit code 3, last available logs (truncated to 20,000 chars):\nboom\n"
    );
    assert_eq!(message("b"), "Job entrypoint command failed with exit code 3. No logs available.");
    assert_eq!(jobs.get("a").and_then(|job| job.error_type), Some(ErrorType::JobEntrypointCommandError));
}

#[test]
fn places_are_given_in_order_and_the_queue_is_bounded() {
    let mut jobs = state(1);
    jobs.submit("a", job(), 0).expect("taken");
    for id in ["b", "c"] {
        assert_eq!(jobs.submit(id, job(), 0), Ok(vec![save(id)]), "no place is left for it");
    }
    assert_eq!(jobs.submit("d", job(), 0), Err(Refused::QueueFull(2)));
    jobs.started("a", KEEPER);
    assert_eq!(jobs.ended("a", End::Exited { code: 0 }, "", 1), [save("a"), start("b")]);
}

#[test]
fn a_job_starts_when_what_it_asks_for_is_set_aside_and_gives_it_back() {
    let mut jobs = state(2);
    let reserve = Command::Reserve("a".into());
    assert_eq!(jobs.submit("a", greedy(), 0), Ok(vec![save("a"), reserve]));
    jobs.waits("a", "node n has 0 of 2 CPUs free, 1 is wanted");
    assert!(message(&jobs, "a").ends_with("for: node n has 0 of 2 CPUs free, 1 is wanted"));
    assert_eq!(
        jobs.submit("b", job(), 0),
        Ok(vec![save("b"), start("b")]),
        "it asks for nothing and overtakes"
    );
    assert_eq!(jobs.reserved("a"), [start("a")]);
    assert_eq!(message(&jobs, "a"), "");
    assert_eq!(jobs.reserved("a"), [], "it is said again by a head that took over");
    jobs.started("a", KEEPER);
    let release = || Command::Release("a".into());
    assert_eq!(jobs.ended("a", End::Exited { code: 0 }, "", 1), [save("a"), release()]);
    jobs.delete("a").expect("ended");
    jobs.submit("a", greedy(), 2).expect("taken");
    assert_eq!(jobs.stop("a", 3), Ok((true, vec![save("a"), release()])), "while it waits");
}

#[test]
fn a_job_ends_when_what_was_set_aside_for_it_is_lost() {
    let mut jobs = state(3);
    for id in ["waits", "starts", "runs"] {
        jobs.submit(id, greedy(), 0).expect("taken");
        jobs.reserved(id);
    }
    jobs.started("runs", KEEPER);
    assert_eq!(jobs.unreserved("runs", "node n is gone".into()), [Command::Stop("runs".into())]);
    assert_eq!(jobs.unreserved("starts", "node n is gone".into()), []);
    assert_eq!(jobs.started("starts", KEEPER), [save("starts"), Command::Stop("starts".into())]);
    for id in ["runs", "starts"] {
        jobs.ended(id, End::Terminated, "", 1);
        let job = jobs.get(id).expect("kept");
        assert_eq!((job.status, job.error_type), (Status::Failed, Some(ErrorType::JobSupervisorActorDied)));
        assert!(message(&jobs, id).ends_with("lost: node n is gone"));
    }
    let mut jobs = state(0);
    jobs.submit("queued", greedy(), 0).expect("taken");
    jobs.reserved("queued");
    jobs.unreserved("queued", "node n is gone".into());
    assert_eq!(jobs.get("queued").map(|job| job.status), Some(Status::Pending));
    assert!(message(&jobs, "queued").ends_with("for: node n is gone"), "it waits again");
}

#[test]
fn a_stop_reaches_a_job_in_every_state() {
    let mut jobs = state(1);
    jobs.submit("running", job(), 0).expect("taken");
    jobs.submit("queued", job(), 0).expect("taken");
    let (stopped, commands) = jobs.stop("queued", 1).expect("there");
    assert_eq!((stopped, commands), (true, vec![save("queued")]));
    assert_eq!(jobs.get("queued").map(|job| job.status), Some(Status::Stopped));
    // While it is being started the stop waits for the keeper.
    assert_eq!(jobs.stop("running", 1), Ok((true, vec![save("running")])));
    assert_eq!(jobs.started("running", KEEPER), [save("running"), Command::Stop("running".into())]);
    jobs.ended("running", End::Exited { code: -15 }, "", 2);
    let job = jobs.get("running").expect("kept");
    assert_eq!((job.status, job.error_type, job.exit_code), (Status::Stopped, None, None));
    assert_eq!(jobs.stop("running", 3), Ok((false, vec![])));
    assert_eq!(jobs.stop("none", 3), Err(Refused::NoSuchJob("none".into())));
}

#[test]
fn only_ended_jobs_are_deleted_and_the_oldest_is_forgotten() {
    let mut jobs = state(1);
    jobs.submit("a", job(), 0).expect("taken");
    assert!(matches!(jobs.delete("a"), Err(Refused::NotEnded { .. })));
    for id in ["a", "b", "c"] {
        if id != "a" {
            jobs.submit(id, job(), 0).expect("taken");
        }
        jobs.started(id, KEEPER);
        let commands = jobs.ended(id, End::Exited { code: 0 }, "", 1);
        assert_eq!(commands.contains(&Command::Forget("a".into())), id == "c", "{id}");
    }
    assert_eq!(jobs.delete("b"), Ok(vec![Command::Forget("b".into())]));
    assert_eq!(jobs.list().len(), 1);
}

#[test]
fn a_restart_goes_on_with_what_was_kept() {
    let mut before = state(1);
    before.submit("a", job(), 0).expect("taken");
    before.started("a", KEEPER);
    before.submit("b", job(), 0).expect("taken");
    before.stop("a", 1).expect("there");
    let kept = before.list().into_iter().cloned().collect();
    let mut after = JobsState::new(Limits { running_max: 1, queued_max: 2, kept_max: 2 }, kept);
    assert_eq!(after.recovered(), [Command::Stop("a".into())], "b waits for a's place");
    assert_eq!(after.ended("a", End::Terminated, "", 2), [save("a"), start("b")]);
    assert_eq!(after.get("a").map(|job| job.status), Some(Status::Stopped));
    assert_eq!(after.submit("c", job(), 3), Ok(vec![save("c")]));
    assert_eq!(after.get("c").map(|job| job.number), Some(2), "numbers go on");
}

#[test]
fn a_killed_keeper_is_said_so_and_the_end_of_the_cluster_is_no_failure() {
    let mut jobs = state(3);
    for (id, end) in [("a", End::Lost), ("b", End::Terminated)] {
        jobs.submit(id, job(), 0).expect("taken");
        jobs.started(id, KEEPER);
        jobs.ended(id, end, "", 1);
    }
    let of = |id| jobs.get(id).map(|job| (job.status, job.error_type)).expect("kept");
    assert_eq!(of("a"), (Status::Failed, Some(ErrorType::JobSupervisorActorDied)));
    assert_eq!(of("b"), (Status::Stopped, None));
}
